"""Methods that write facts into W_out."""
