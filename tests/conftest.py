import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the Hub
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # make test-gpu names one: numbers of other tests are a CPU's
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the other way to look for GPUs leaves forks without them


def pytest_report_header():
    folder = Path(os.environ.get("SAGEMAKER_ENVS", ROOT / ".venv-sagemaker"))
    built = [name for name in ("v2", "v3", "platform") if (folder / name / "bin/python").exists()]
    return f"SageMaker environments (make sagemaker-envs): {', '.join(built) or 'none, their tests skip'}"


def pytest_collection_modifyitems(items):
    """Files that train and start scripts come first, so that no worker ends with one of them alone."""
    items.sort(key=lambda item: str(item.path), reverse=True)  # within a file the order stays


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that CAPTION_TEST_DATA names."""
    folder = os.environ.get("CAPTION_TEST_DATA")
    if not folder:
        pytest.skip("CAPTION_TEST_DATA is not set: tests on real data need it")
    return Path(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """small_run's pictures with their captions and splits."""
    import tiny
    from small_run import CAPTIONS, SPLITS

    return tiny.write_photos(tmp_path_factory.mktemp("photos"), CAPTIONS, SPLITS)


@pytest.fixture(autouse=True)
def environment():
    """Libraries write into it; the next test finds it as this one did."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
