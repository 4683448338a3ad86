"""hessnb: "Hessian-based Analysis of Large Batch Training and Robustness to Adversaries", re-done.

The package behind the book. Data flows one way through its modules, and imports follow it:

    data -> models -> training -> curvature, landscape,
                                  attacks, robustness       numerics, torch only
         -> experiments (spec, grid, results, store, run)   what to compute, and what is there
         -> paper, figures                                  what to show
         -> book, cli                                       how it is run and published

Reference: Z. Yao, A. Gholami, Q. Lei, K. Keutzer, M. W. Mahoney (2018), arXiv:1802.08241.
"""

__version__ = "0.1.0"
