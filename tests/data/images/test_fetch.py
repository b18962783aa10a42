"""Pictures from addresses: with limits, and never from a private network unless that is allowed."""

import socket

import pytest

import data.images.fetch as module
import data.images.web_address as web_address
from data.images.fetch import FetchLimits, fetch
from data.images.files import ImageError
from data.images.web_address import is_public
from tests.data.images.web import CERTIFICATE, QUICK, Web, picture, ref


@pytest.fixture
def home_is_public(monkeypatch):
    """127.0.0.1 stands for the Internet; everything else is as private as it is."""
    monkeypatch.setattr(web_address, "is_public", lambda ip: ip == "127.0.0.1" or is_public(ip))


def get(web: Web, path: str, limits: FetchLimits = QUICK) -> bytes:
    return fetch(web.url(path), limits=limits, allow_private=True).data


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_an_answer_that_is_final(web, status):
    web.answers["/x"] = lambda handler: handler.send_error(status)
    with pytest.raises(ImageError, match=rf"cannot fetch {web.url('/x')}: the server answers {status} [A-Z]\w+"):
        get(web, "/x")
    assert len(web.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_answer_that_may_pass_is_asked_for_again(web, status):
    answers = iter([lambda handler: handler.send_error(status), lambda handler: handler.give(b"picture")])
    web.answers["/x"] = lambda handler: next(answers)(handler)
    assert get(web, "/x") == b"picture"


def test_a_server_that_stays_broken(web):
    web.answers["/x"] = lambda handler: handler.send_error(502)
    with pytest.raises(ImageError, match=r"the server answers 502 Bad Gateway \(after 3 tries\)"):
        get(web, "/x")
    assert len(web.asked) == 3


def test_nobody_answers():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/a.png"
    with pytest.raises(ImageError, match=rf"cannot fetch {address}: Connection refused \(after 3 tries\)"):
        fetch(address, limits=QUICK, allow_private=True)
    with pytest.raises(ImageError, match=r"cannot fetch http://absent\.invalid/: (no such host|.*name resolution)"):
        fetch("http://absent.invalid/", limits=QUICK, allow_private=True)


def test_a_server_that_says_nothing(web):
    web.answers["/x"] = lambda handler: handler.server.ending.wait(10)
    with pytest.raises(ImageError, match=r"cannot fetch .*/x: timed out"):
        get(web, "/x", FetchLimits(read_seconds=0.2))
    assert len(web.asked) == 1


@pytest.mark.parametrize("part", ["headers", "body"])
@pytest.mark.slow
def test_a_server_that_sends_a_byte_now_and_then(web, part):
    """Each byte came before read_seconds were over: one such server held a run up for ever."""

    def drip(handler):
        if part == "body":
            handler.send_response(200)
            handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            if handler.server.ending.wait(0.05):
                return

    web.answers["/x"] = drip
    limits = FetchLimits(read_seconds=5, total_seconds=0.4)
    with pytest.raises(ImageError, match=r"cannot fetch .*/x: timed out"):
        get(web, "/x", limits)


def test_redirects(web, reader):
    """To another path, relative, and for ever."""
    web.answers["/1"] = lambda handler: handler.redirect("/2", 301)
    web.answers["/2"] = lambda handler: handler.redirect(web.url("/a.png"), 307)
    assert get(web, "/1") == picture()
    web.answers["/%E7%8C%AB.png"] = web.answers["/a.png"]
    web.answers["/cat"] = lambda handler: handler.redirect("/猫.png".encode().decode("latin-1"))
    assert get(web, "/cat") == picture()
    web.answers["/loop"] = lambda handler: handler.redirect("/loop")
    with pytest.raises(ImageError, match=rf"cannot fetch {web.url('/loop')}: more than 5 redirects"):
        reader.size(ref(web.url("/loop")))


@pytest.mark.parametrize(
    ("to", "problem"),
    [
        ("http://127.0.0.2:{port}/a.png", r"it leads to 127\.0\.0\.2, in a private or local network"),
        ("http://2130706434:{port}/a.png", "it leads to 2130706434, in a private or local network"),
        ("http://0x7f000002:{port}/a.png", "it leads to 0x7f000002, in a private or local network"),
        ("http://[::1]:{port}/a.png", "it leads to ::1, in a private or local network"),
        ("http://[::ffff:127.0.0.2]:{port}/a.png", "in a private or local network"),
        ("http://169.254.169.254/latest/meta-data/", r"it leads to 169\.254\.169\.254, in a private or local network"),
        ("http://10.0.0.1/", r"it leads to 10\.0\.0\.1, in a private or local network"),
        ("//0/", "it leads to 0, in a private or local network"),
        ("file:///etc/passwd", "it redirects to file:///etc/passwd: expected an address of http or https"),
        ("ftp://127.0.0.1/a", "it redirects to ftp://127.0.0.1/a: expected an address of http or https"),
        ("http://127.0.0.1@127.0.0.2/", "expected an address without a user name or a password"),
        ("http://127.0.0.1\\@127.0.0.2/", "expected an address without a user name or a password"),
        ("http://[::1", r"it redirects to http://\[::1: not an address"),
    ],
)
def test_redirect_into_a_private_network(web, home_is_public, to, problem):
    """A row of somebody's data set read the cloud's credentials from 169.254.169.254, by way of a public address."""
    web.answers["/x"] = lambda handler: handler.redirect(to.format(port=web.server_port))
    with pytest.raises(ImageError, match=rf"^cannot fetch {web.url('/x')}: .*{problem}"):
        fetch(web.url("/x"), limits=QUICK, allow_private=False)
    assert [path for path, _ in web.asked] == ["/x"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/", "http://localhost:1/", "http://127.1:1/", "http://[::]/"])
def test_private_addresses_are_refused_at_once(address):
    with pytest.raises(ImageError, match=r"in a private or local network; with data\.allow_private_urls=true"):
        fetch(address, limits=QUICK, allow_private=False)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((a, True) for a in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")),
        *((a, False) for a in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0")),
        *((a, False) for a in ("100.100.100.200", "224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1")),
        *((a, False) for a in ("::", "::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "::127.0.0.1")),
        *((a, False) for a in ("::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "2001:0:7f00:1::")),
    ],
)
def test_what_is_public(address, public):
    assert is_public(address) is public


@pytest.fixture
def names(monkeypatch) -> dict[str, list[list[str]]]:
    """What names resolve to, one list of addresses for each time that they are looked up."""
    known: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def look_up(host, port, *args, **options):
        if host not in known:
            return real(host, port, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in known[host].pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


def test_every_address_of_a_name_is_checked(web, home_is_public, names):
    names["pictures.example"] = [["127.0.0.1", "10.0.0.1"]]
    with pytest.raises(ImageError, match=r"it leads to pictures\.example, in a private or local network"):
        fetch(web.url("/a.png", "pictures.example"), limits=QUICK, allow_private=False)
    assert not web.asked


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "169.254.169.254", "::ffff:127.0.0.1", "10.1.2.3", "fd00::1", "0.0.0.0", "100.64.0.1"],
)
def test_a_name_that_leads_to_a_local_address(names, address):
    names["pictures.example"] = [[address]]
    with pytest.raises(ImageError, match=r"it leads to pictures\.example, in a private or local network"):
        fetch("http://pictures.example:9/a.png", limits=QUICK, allow_private=False)


def test_the_connection_goes_to_the_address_that_was_checked(web, home_is_public, names):
    """A name may mean another machine at the second look: there is none."""
    names["pictures.example"] = [["127.0.0.1"], ["127.0.0.2"]]
    assert fetch(web.url("/a.png", "pictures.example"), limits=QUICK, allow_private=False).data == picture()
    assert web.asked == [("/a.png", f"pictures.example:{web.server_port}")]
    assert names["pictures.example"] == [["127.0.0.2"]]


def test_tls_checks_the_name_though_it_connects_to_an_address(home_is_public, names, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    module._tls.cache_clear()
    server = Web(secure=True)
    try:
        server.answers["/a.png"] = lambda handler: handler.give(picture())
        names.update({"pictures.example": [["127.0.0.1"]] * 2, "other.example": [["127.0.0.1"]]})
        address = f"https://pictures.example:{server.server_port}/a.png"
        assert fetch(address, limits=QUICK, allow_private=False).data == picture()
        with pytest.raises(ImageError, match=r"its certificate is not valid .*other\.example"):
            fetch(address.replace("pictures", "other"), limits=QUICK, allow_private=False)
        monkeypatch.delenv("SSL_CERT_FILE")
        module._tls.cache_clear()
        with pytest.raises(ImageError, match=r"its certificate is not valid \(self.signed certificate"):
            fetch(address, limits=QUICK, allow_private=False)
    finally:
        module._tls.cache_clear()
        server.end()


def test_body_that_is_not_what_was_announced(web, reader):
    """Less than announced is asked for again; of more, what was announced counts, and that is half a picture."""
    data = picture()
    web.answers["/less"] = lambda handler: handler.give(data[:1000], length=len(data))
    with pytest.raises(ImageError, match=rf"the server announced {len(data)} bytes and sent 1000 \(after 3 tries\)"):
        reader.size(ref(web.url("/less")))
    web.answers["/more"] = lambda handler: handler.give(data, length=1000)
    with pytest.raises(ImageError, match=rf"truncated image, its end is missing: {web.url('/more')}"):
        reader.size(ref(web.url("/more")))
    assert reader.state(ref(web.url("/more"))) is None  # nothing of it is kept
    web.answers["/more"] = web.answers["/a.png"]
    assert reader.size(ref(web.url("/more"))) == (90, 60)


def test_body_without_a_length(web):
    def until_it_ends(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(picture())

    def in_chunks(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(picture()), 5000):
            part = picture()[start : start + 5000]
            handler.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    web.answers.update({"/a": until_it_ends, "/b": in_chunks})
    assert get(web, "/a") == get(web, "/b") == picture()


def test_too_many_bytes(web):
    def without_end(handler):
        handler.send_response(200)
        handler.end_headers()
        while not handler.server.ending.is_set():
            handler.wfile.write(b"x" * 10_000)

    def a_byte_too_many(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"x" * 200_001)

    web.answers["/over"] = a_byte_too_many
    with pytest.raises(ImageError, match=r"cannot fetch .*/over: expected at most 200000 bytes, found more"):
        get(web, "/over")
    web.answers["/long"] = lambda handler: handler.give(b"", length=200_001)
    web.answers["/endless"] = without_end
    with pytest.raises(ImageError, match=r"cannot fetch .*/long: expected at most 200000 bytes, found 200001"):
        get(web, "/long")
    with pytest.raises(ImageError, match=r"cannot fetch .*/endless: expected at most 200000 bytes, found more"):
        get(web, "/endless")


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (b"-1", "expected at most 200000 bytes, found more"),
        (b"-5", "read length must be non-negative"),
        (b"xyz", "IncompleteRead"),
        (b"fffffff", "expected at most 200000 bytes, found more"),
    ],
)
def test_chunks_of_impossible_sizes(web, size, problem):
    """http.client reads a chunk of -1 bytes to its end: a server that has none filled the memory."""

    def in_chunks(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(size + b"\r\n")
        while not handler.server.ending.is_set():
            handler.wfile.write(b"x" * 100_000)

    web.answers["/x"] = in_chunks
    with pytest.raises(ImageError, match=f"cannot fetch .*/x: {problem}"):
        get(web, "/x")


def test_a_page_in_place_of_a_picture(web, reader):
    """A login page with status 200 is the commonest of all dead links."""
    web.answers["/x.jpg"] = lambda handler: handler.give(b"<!DOCTYPE html>", kind="text/html; charset=utf-8")
    with pytest.raises(ImageError, match=r"found something else at .*/x\.jpg \(the server calls it text/html\)"):
        reader.size(ref(web.url("/x.jpg")))
    web.answers["/empty"] = lambda handler: handler.give(b"")
    with pytest.raises(ImageError, match=r"found something else at .*/empty|found 0 bytes"):
        reader.size(ref(web.url("/empty")))


@pytest.mark.parametrize("answer", [b"\x00" * 100, b"HTTP/1.1 999999 x\r\n\r\n", b"HTTP/1.1 200 OK\r\nA" * 70_000, b""])
def test_a_server_that_speaks_no_http(web, answer):
    web.answers["/x"] = lambda handler: handler.wfile.write(answer)
    with pytest.raises(ImageError, match=r"cannot fetch .*/x: ") as caught:
        get(web, "/x")
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://" + "a" * 100_000, "no such host|not an address|name resolution"),
        ("http://a.example:port/", "not an address"),
        ("http://a.example:99999/", "not an address"),
        ("http://\u3002\u3002/", "not an address"),
        ("http://a b/", "expected an address with the name of a host"),
        ("http://", "expected an address with the name of a host"),
        ("gopher://a/", "expected an address of http or https"),
        ("http://user:secret@127.0.0.1/", "expected an address without a user name or a password"),
    ],
)
def test_addresses_that_cannot_be_used(address, problem):
    with pytest.raises(
        ImageError, match=rf"^cannot fetch http.*({problem})|^cannot fetch gopher.*({problem})"
    ) as caught:
        fetch(address, limits=QUICK, allow_private=True)
    assert len(str(caught.value)) < 600


def test_addresses_as_people_write_them(web):
    """With spaces, Chinese characters, and parts that are quoted already."""
    web.answers["/%E7%8C%AB%20a%2Fb.png?w=%E7%8C%AB&h=1"] = lambda handler: handler.give(b"x")
    assert get(web, "/猫 a%2Fb.png?w=猫&h=1#part") == b"x"
    assert get(web, "/猫\n a%2Fb.png?w=猫&h=1") == b"x"  # no header can be smuggled in
