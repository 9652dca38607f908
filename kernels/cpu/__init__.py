"""What only a CPU needs: native C, packed weights, the paged layout."""
