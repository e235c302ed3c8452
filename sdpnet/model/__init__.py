"""SdP-Net: blocks, positions, depthwise convolution, counts of operations, and its entry into timm."""
