"""The wing trt."""
