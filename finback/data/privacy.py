"""Redacts private data: e-mail addresses, IP addresses and telephone numbers are replaced by a mark of their type.

Lookalikes are not redacted: versions, netmasks, dates, prices, decimals, slices in code. Does not import torch.
"""

import ipaddress
import re
from collections.abc import Callable

from finback.data import phones

# letters of scripts with spaces between words: an address in Chinese text ends where the Chinese text continues
_W = r"0-9A-Za-z_\u00c0-\u058f"
_EMAIL = re.compile(
    rf"(?<![{_W}.+%-])(?:[{_W}+%-][{_W}.+%-]*(?:'[{_W}.+%-]+){{0,2}}|[^\W{_W}]+)@"
    rf"(?:\[[\da-fA-F.:]+\]|(?:(?:[{_W}-]+|[^\W{_W}]+)\.)+(?:[A-Za-z\u00c0-\u058f]{{2,24}}(?![{_W}(])|xn--[\w-]+|[^\W{_W}]{{2,}}))"
)
_IPV4 = re.compile(r"(?<![A-Za-z0-9_.])\d{1,3}(?:\.\d{1,3}){3}(?![A-Za-z0-9_]|\.\d)")
_IPV6 = re.compile(
    r"(?<![\w:.])(?:[23][0-9a-f]{3}|f[c-f][0-9a-f]{2})(?::[0-9a-f]{0,4}){2,7}(?![\w:])(?:%\w+)?", re.IGNORECASE
)
_NETWORK_WORDS = re.compile(
    r"\b(?:ip(?:v4)?|addr\w*|hosts?|hostname|servers?|dns|gateway|router|clients?|ping|ssh|curl|connect\w*|log(?:ged )?in|"
    r"prox(?:y|ies)|peers?|remote|nameservers?|visitors?)\b|//|@",
    re.IGNORECASE,
)
_VERSION_WORDS = re.compile(
    r"(?:\b|_)(?:v|vers?|versions?|releases?|released|rev|revision|build|firmware|driver|bios|kernel|patch(?:ed)?|updated?|"
    r"upgraded?|downgraded?|installed?|sections?|sec|chapter|clause|paragraph|article|figure|table|appendix|oid|"
    r"python|java|node|nginx|windows|office|chrome|firefox|safari|android|ios|macos|linux|ubuntu|postgres\w*|mysql|cuda)(?:\b|_)|§|"
    r"[=<>~!]=|[~^]",
    re.IGNORECASE,
)
_ATTACHED = re.compile(r"(?:[A-Za-z]/|[A-Za-z0-9][-_]|\bv\.?)$")  # Chrome/120.0.1.2, package-1.2.3.4
_NEAR = 40  # distance within which a preceding word identifies a number


def redact(text: str) -> tuple[str, int]:
    """The text with private data replaced by [email], [ip] and [phone], and the number of replacements."""
    emails = v4 = v6 = 0
    if "@" in text:
        text, emails = _replace(_EMAIL, "[email]", text, _is_email)
    if text.count(".") >= 3:
        text, v4 = _replace(_IPV4, "[ip]", text, _is_ipv4)
    if text.count(":") >= 2:
        text, v6 = _replace(_IPV6, "[ip]", text, _is_ipv6)
    text, numbers = phones.redact(text)
    return text, emails + v4 + v6 + numbers


def _replace(
    pattern: re.Pattern[str], mark: str, text: str, is_private: Callable[[re.Match[str]], bool]
) -> tuple[str, int]:
    found = 0

    def marked(match: re.Match[str]) -> str:
        nonlocal found
        private = is_private(match)
        found += private
        return mark if private else match[0]

    return pattern.sub(marked, text), found


def _is_email(match: re.Match[str]) -> bool:
    """git@host:path is a repository, not an address."""
    return not (match[0].startswith("git@") and match.string[match.end() : match.end() + 1] == ":")


def _is_ipv4(match: re.Match[str]) -> bool:
    """Whether four numbers are a host's address, not a version, section, netmask or loopback."""
    octets = [int(part) for part in match[0].split(".")]
    if max(octets) > 255 or any(len(part) > 1 and part[0] == "0" for part in match[0].split(".")):
        return False
    if octets[0] in (0, 127, 255) or octets[3] == 0 or octets[2:] == [255, 255]:
        return False  # unspecified, loopback, masks, networks, broadcasts
    before = match.string[max(0, match.start() - _NEAR) : match.start()].rpartition("\n")[2]
    network, version = _last(_NETWORK_WORDS, before), _last(_VERSION_WORDS, before)
    if _ATTACHED.search(before) or version > network:
        return False
    return max(octets) > 9 or len(set(octets)) == 1 or network >= 0


def _is_ipv6(match: re.Match[str]) -> bool:
    try:
        ipaddress.IPv6Address(match[0].partition("%")[0])
    except ValueError:
        return False
    return True


def _last(pattern: re.Pattern[str], text: str) -> int:
    """Start of the last match, -1 if there is none."""
    return max((match.start() for match in pattern.finditer(text)), default=-1)
