"""Neural architecture search with reinforcement learning (Zoph and Le 2017): a controller writes networks and is paid by their accuracy."""
