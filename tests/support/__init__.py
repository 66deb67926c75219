"""What several tests build on: tiny random models in real files."""
