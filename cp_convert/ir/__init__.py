"""What passes between the wings: programs, networks, tensors in files, and one record a stage."""
