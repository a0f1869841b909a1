import pytest
import torch


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody wrote holds NaN, or the greatest integer."""

    def fill(tensor):
        worst = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        return tensor.fill_(worst) if tensor.dtype != torch.bool else tensor

    def poisoned(plain):
        return lambda *arguments, **settings: fill(plain(*arguments, **settings))

    for home, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(home, name, poisoned(getattr(home, name)))
