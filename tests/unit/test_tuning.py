import pytest

from hiprune_vllm import tuning


def test_settings_have_defaults_and_refuse_what_they_do_not_know(monkeypatch):
    for name, choices in tuning.CHOICES.items():
        monkeypatch.delenv(name, raising=False)
        assert tuning.chosen(name) == choices[0]
        monkeypatch.setenv(name, choices[1])
        assert tuning.chosen(name) == choices[1]
        monkeypatch.setenv(name, "fast")
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'fast'"):
            tuning.check()
        monkeypatch.delenv(name)
    tuning.check()
