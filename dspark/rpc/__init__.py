"""gRPC as every service uses it: translation, server, channel, sessions and pieces. Knows no service's logic."""
