"""HTTP/2 as gRPC needs it, without IO: headers, and a connection's rules. For servers and for clients."""
