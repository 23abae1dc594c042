"""The public stubs know fewer forms of masks than the library takes; these say nothing about them."""
