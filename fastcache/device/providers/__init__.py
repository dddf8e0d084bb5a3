"""Ways to split the SMs, in the order they are tried. One file each."""
