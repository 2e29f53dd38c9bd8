"""Run folders that are odd as a whole; tests/fuzz/run_folders.py damages what is in them."""

import os
import re
from pathlib import Path

from tests.fuzz.run_folders import look, make


def test_odd_folders_have_a_row_that_says_why(home: Path) -> None:
    make("good")
    odd = make("odd")
    folder = odd.path.parent
    os.rename(odd.path, folder / os.fsdecode(b"n\xff\xfe"))
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "a\nb").mkdir()
    (folder / "a\nb" / "experiment.yaml").write_text("name: [")
    journal_is_folder, other = make("folder"), make("never")
    journal_is_folder.journal_file.unlink()
    journal_is_folder.journal_file.mkdir()
    other.launch_file.unlink()
    (folder / "no-run").mkdir()
    (folder / "file").write_text("")
    shown, _ = look("folder", home)
    for name in (r"n\xff\xfe", "gone", "loop", r"a\nb", "folder"):
        assert re.search(rf"^{re.escape(name)}  unreadable: ", shown, re.MULTILINE), name
    assert re.search("^never +failed", shown, re.MULTILINE)
    assert "no-run" not in shown
    assert "file  " not in shown
    other.journal_file.unlink()
    assert "status      died: it was never submitted" in look("never", home)[1]
