import pytest
import torch

from blaq.train import verify


def test_check_logits_by_hand():
    exact = torch.tensor([[1.0, 2.0], [4.0, 3.0]], dtype=torch.float64)
    trained = (exact + 1e-4).float()
    within, beyond = (exact + 1.9e-4).float(), (exact + 2.1e-4).float()
    near, far = (exact * (1 + 7.9e-4)).float(), (exact * (1 + 8.1e-4)).float()  # two layers' 8e-4
    for reference, fast, high, outcome in (
            (trained, trained, trained, [True, True, True]),
            (trained, within, near, [True, True, True]),
            (trained, beyond, far, [True, False, False]),
            (trained.nextafter(torch.tensor(9.0)), within, near, [False, True, True]),
            (trained * torch.nan, trained * torch.nan, trained * torch.nan, [False] * 3)):
        checks = verify.check_logits(trained, exact, reference, fast, high, 2)
        assert [check.passed for check in checks] == outcome
    assert checks[0].measured.startswith("4 of 4 differ")


def test_a_process_that_cannot_load_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"must load .*packed.safetensors, got: (.|\n)*config"):
        verify.fresh_logits(tmp_path, "auto")
