"""TensorRT and Torch-TensorRT, imported in the one order that works, with or without a driver."""
