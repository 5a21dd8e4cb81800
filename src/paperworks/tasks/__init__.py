"""One contract per task: what a sample is, what a network returns, default loss, metrics, picture, writer."""
