"""What GPUs can do, one TOML a kind."""
