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


def test_a_switch_is_on_or_off_and_nothing_else(monkeypatch):
    for switch in (tuning.DISABLE, tuning.ANY_VLLM):
        monkeypatch.delenv(switch, raising=False)
        assert not tuning.on(switch)
        for text, expected in {
            "1": True,
            "True": True,
            "0": False,
            "false": False,
            "": False,
        }.items():
            monkeypatch.setenv(switch, text)
            assert tuning.on(switch) is expected
        monkeypatch.setenv(switch, "perhaps")
        with pytest.raises(ValueError, match=f"{switch} must be 1 or 0, got 'perhaps'"):
            tuning.on(switch)
