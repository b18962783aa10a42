"""CSV: every cell as the text that stands there, and what is damaged refused."""

import pandas
import pytest

from data.settings import SourceSettings
from data.sources.open import open_sources
from vl2.errors import UserError


def all_rows(path):
    (rows,) = open_sources(SourceSettings(path=str(path)), cache=None)
    return [rows[i] for i in range(len(rows))]


def test_csv_is_text_as_it_stands_there(tmp_path):
    """No number is rounded, no NA made nothing; an empty cell is an absent key, a row of them no row."""
    path = tmp_path / "a.csv"
    path.write_text('\ufeffid;q;picture\n007;"x\ny";1.50\n\n1;NA;\n;;\n2;"a;""b""";é\n', "utf-8")
    (rows,) = open_sources(SourceSettings(path=str(path)), cache=tmp_path / "cache")
    assert [rows[i] for i in range(len(rows))] == [
        {"id": "007", "q": "x\ny", "picture": "1.50"},
        {"id": "1", "q": "NA"},
        {"id": "2", "q": 'a;"b"', "picture": "é"},
    ]
    assert [rows.number(i) for i in range(len(rows))] == [2, 4, 6]  # as a spreadsheet shows them
    pandas.DataFrame({"a": ["1", "2"], "b": ["x,y", "z"]}).to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    assert all_rows(tmp_path / "a.tsv") == [{"a": "1", "b": "x,y"}, {"a": "2", "b": "z"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n3,4,5\n", r"a\.csv: cannot read the CSV file: .*Expected 2 fields in line 3, saw 3"),
        (b"a,b\n1,\xff\xfe\n", r"a\.csv: cannot read the CSV file: .*can't decode byte 0xff"),
        (b"a,b\n1,2\n1,x\0y\n", r"a\.csv: expected a CSV file in UTF-8, found a NUL at byte 11; save it as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16-le"), r"a\.csv: expected a CSV file in UTF-8, found a NUL at byte 1; .*UTF-16"),
        (b'a,b\n1,"2\n', r"a\.csv: cannot read the CSV file: .*EOF inside string"),
    ],
)
def test_a_csv_that_is_damaged(tmp_path, content, message):
    """Of a cell with a NUL pandas dropped all from there on."""
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        all_rows(tmp_path / "a.csv")
