"""hessnb: "Hessian-based Analysis of Large Batch Training and Robustness to Adversaries", re-done.

The package behind the book. Data flows one way through its modules, and imports follow it:

    data, models -> checks -> training, together -> sharpness
                           -> curvature ----------> sharpness
                                        -> attacks -> robustness
                           -> landscape
    statistics                                  numerics: torch, NumPy, SciPy
    -> experiments                              what to compute, and what is there
    -> paper -> figures                         what to show
       widgets                                  the same, to play with, on the numerics alone
    -> notebooks, book, cli                     how it is run and published

What the numerics share stands below them: errors, identity, pace, points, precision, steps.

Reference: Z. Yao, A. Gholami, Q. Lei, K. Keutzer, M. W. Mahoney (2018), arXiv:1802.08241.
"""

__version__ = "0.1.0"
