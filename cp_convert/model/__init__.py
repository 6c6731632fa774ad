"""A model file, preset or weights come in, a module ready to be traced goes out."""
