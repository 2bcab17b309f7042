"""The network: pure Flax (Linen) modules, without input or output, mesh names or global configuration.

Shape suffixes name the axes of an array:

    B batch            T query position, new token      S key position, cache slot     D model width
    H heads            E experts                        K experts chosen per token     G expert groups
    N tokens (B·T)     F feed-forward width             L layers                       V vocabulary
    R permuted tokens (N·K plus padding)                P prompt slots
    n, r, v, c head widths and latent rank

A variable tree is {"params": …, "router_bias": …}: trainable weights, and the correction biases of the routers, which
neither gradients nor weight decay change. Both are always arguments of a jitted function.
"""
