"""Language: networks that read and write texts."""
