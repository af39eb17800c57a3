import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from data import uploads


def png(seed: int, side: int = 16) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_zip(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def test_files_and_members_come_in_order_with_an_error_in_the_place_of_what_is_no_image(tmp_path):
    (tmp_path / "alone.png").write_bytes(png(0))
    (tmp_path / "text.jpg").write_text("no picture")
    archive = write_zip(
        tmp_path / "a.zip",
        {
            "b/one.png": png(1),
            "__MACOSX/b/one.png": b"x",
            "../two.png": png(2),
            "notes.txt": b"hello",
            "empty.png": b"",
        },
    )
    listed = uploads.list_uploads([str(tmp_path / "alone.png"), str(tmp_path / "text.jpg"), archive], limit=6)
    assert [name for name, _, _ in listed] == [
        "alone.png",
        "text.jpg",
        "b/one.png",
        "../two.png",
        "notes.txt",
        "empty.png",
    ]
    chunks = list(uploads.read_uploads(listed, chunk=4))
    assert [len(chunk) for chunk in chunks] == [4, 2]
    found = {name: image for chunk in chunks for name, image in chunk}
    np.testing.assert_array_equal(found["../two.png"], np.asarray(Image.open(io.BytesIO(png(2)))))
    assert [name for name, image in found.items() if isinstance(image, Exception)] == [
        "text.jpg", "notes.txt", "empty.png",
    ]  # fmt: skip
    assert str(found["text.jpg"]).startswith("text.jpg: not an image")  # and no folder of the server's
    with pytest.raises(ValueError, match="6 files are more than the 5"):
        uploads.list_uploads([str(tmp_path / "alone.png"), str(tmp_path / "text.jpg"), archive], limit=5)


def test_a_member_that_unpacks_to_too_much_is_stopped_at_the_bound(tmp_path):
    archive = write_zip(tmp_path / "bomb.zip", {"bomb.png": bytes(uploads.MEMBER_BYTES + 1), "good.png": png(0)})
    ((_, bomb), (_, good)) = next(uploads.read_uploads(uploads.list_uploads([archive], 10), chunk=8))
    assert "larger than 50 MB unpacked" in str(bomb)
    assert good.size == (16, 16)


def test_a_damaged_and_an_encrypted_member_are_errors_of_their_own(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"damaged.png": png(0), "secret.png": png(1), "good.png": png(2)})
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[60] ^= 0xFF  # in the first member's data
    listed = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)
    content[listed + 8] |= 1  # the second one's flag of encryption
    (tmp_path / "a.zip").write_bytes(content)
    ((_, damaged), (_, secret), (_, good)) = next(uploads.read_uploads(uploads.list_uploads([path], 10), chunk=8))
    assert isinstance(damaged, Exception)
    assert "encrypted" in str(secret)
    assert good.size == (16, 16)


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\5\6", b"PK\5\6" + b"\xff" * 18])
def test_what_is_no_zip_or_lists_too_much_is_refused(content, tmp_path):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip: not a zip that can be read"):
        uploads.list_uploads([str(tmp_path / "a.zip")], 10)


def test_few_large_images_are_held_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_PIXELS", 600)  # two of 16 x 16 and a third
    archive = write_zip(tmp_path / "a.zip", {f"{i}.png": png(i) for i in range(7)})
    assert [len(c) for c in uploads.read_uploads(uploads.list_uploads([archive], 10), chunk=8)] == [3, 3, 1]
