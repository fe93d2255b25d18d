"""What tests share: fakes at process boundaries, servers, fixtures."""
