"""The decoder's last convolution and its sigmoid, from the phases of a map to pictures, in one kernel on a GPU."""
