"""Linear attention: sums over keys that keep a state, in time linear in the length; in torch operations and in Triton kernels.

    S_i = sum_{j visible} lam^(i-j) phi_k(j) v_j^T      the state; its sums z_i are the same without v
    O_i = phi_q(i)^T S_i / (phi_q(i) . z_i + eps)       undivided where nothing is normalised

Each head has its own `lam`, or none. A chunk of tokens is computed from the scores inside of it and from the state before it
(Katharopoulos et al. 2020, arXiv:2006.16236; chunks as in Lightning Attention, arXiv:2401.04658). `ops.py` registers the operators,
`portable.py` is the torch family, `kernels.py` launches `templates/linear.py`.
"""
