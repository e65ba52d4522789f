"""The second half of spatial linear attention, from the normed map to the result, in one kernel on a GPU."""
