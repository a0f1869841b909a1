import pytest
import torch


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody wrote holds NaN, or the greatest integer."""

    def fill(tensor):
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    def poisoned(plain):
        return lambda *arguments, **settings: fill(plain(*arguments, **settings))

    for home, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(home, name, poisoned(getattr(home, name)))
