"""Nothing that the solver prints reaches standard output, and what is printed before and after does."""

import os

import numpy as np
from acc.calibrate import program
from scipy.optimize import Bounds, LinearConstraint


def small():
    return program.milp(
        np.array([1.0, 2.0]),
        integrality=np.ones(2),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(np.ones((1, 2)), 1, 1)],
        options={"mip_rel_gap": 0.0},
    )


def test_the_solver_is_not_heard(capfd, monkeypatch):
    plain = program.solve

    def loud(*args, **options):
        os.write(1, b"solver\n")
        return plain(*args, **options)

    monkeypatch.setattr(program, "solve", loud)
    print("before")
    assert small().x.tolist() == [1, 0]
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"
