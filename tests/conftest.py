from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5 in small: CLIP tower of 9 layers on a 24x24 grid."""
    from tests.reference import random_llava

    folder = tmp_path_factory.mktemp("llava-clip")
    random_llava.build(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA with a SigLIP tower: no CLS token, another grid (16x16)."""
    from tests.reference import random_llava

    folder = tmp_path_factory.mktemp("llava-siglip")
    random_llava.build(folder, siglip=True, vision={"image_size": 224})
    return folder
