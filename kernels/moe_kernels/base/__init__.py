"""What all kernels are written with: backends, checks, launches, registered ops, numerics, scans."""
