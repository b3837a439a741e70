"""What becomes of normalization layers where participants' data are unlike."""
