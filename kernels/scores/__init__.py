"""What blocks of keys weigh for blocks of queries, without ever keeping their scores. ``triton``: on NVIDIA GPUs."""
