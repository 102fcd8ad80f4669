from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5 in small: CLIP tower of 9 layers on a 24x24 grid."""
    from hiprune_server import demo

    folder = tmp_path_factory.mktemp("llava-clip")
    demo.build(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA with a SigLIP tower: no CLS token, another grid (16x16)."""
    from hiprune_server import demo

    folder = tmp_path_factory.mktemp("llava-siglip")
    demo.build(folder, siglip=True, vision={"image_size": 224})
    return folder
