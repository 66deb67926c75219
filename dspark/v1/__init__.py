"""Generated protobuf and gRPC stubs of the package dspark.v1. `make proto` writes them; never edit them."""
