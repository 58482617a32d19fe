"""The compiled faces of `kernels.ngrams` and `kernels.json_lines`: numba over raw bytes. Imported only where numba is installed.

`no_type_check` keeps run-time type checkers, which wrap functions, away from what numba has to read.
"""

from typing import no_type_check

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

compiled = numba.njit(nogil=True, cache=True)

FNV_OFFSET = np.uint64(0xCBF29CE484222325)
FNV_PRIME = np.uint64(0x100000001B3)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
U33 = np.uint64(33)
U32 = np.uint64(32)
LOW = np.uint64(0xFFFFFFFF)

SIGMA, DOTTED_I = 0x3A3, 0x130  # capitals whose lower case depends on their neighbours, or is two characters

KEY_WORDS = 7
"""An entry of the memo: seven words of eight bytes for the n-gram, one for its length and bucket; a cache line in all."""

ROUNDS = np.array([
    0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4, 0xAB1C5ED5, 0xD807AA98, 0x12835B01, 0x243185BE,
    0x550C7DC3, 0x72BE5D74, 0x80DEB1FE, 0x9BDC06A7, 0xC19BF174, 0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F, 0x4A7484AA,
    0x5CB0A9DC, 0x76F988DA, 0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7, 0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967, 0x27B70A85,
    0x2E1B2138, 0x4D2C6DFC, 0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85, 0xA2BFE8A1, 0xA81A664B, 0xC24B8B70, 0xC76C51A3,
    0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070, 0x19A4C116, 0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F,
    0x682E6FF3, 0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7, 0xC67178F2,
], dtype=np.uint32)  # fmt: skip
START = np.array([0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], dtype=np.uint32)


@compiled
@no_type_check
def _mixed(value):
    value = (value ^ (value >> U33)) * MIX_1
    value = (value ^ (value >> U33)) * MIX_2
    return value ^ (value >> U33)


@compiled
@no_type_check
def _code_point(text, at):
    """The code point that begins at `at` in valid UTF-8, and where the next one begins."""
    first = np.int64(text[at])
    if first < 0x80:
        return first, at + 1
    if first < 0xE0:
        return ((first & 0x1F) << 6) | (np.int64(text[at + 1]) & 0x3F), at + 2
    if first < 0xF0:
        return ((first & 0x0F) << 12) | ((np.int64(text[at + 1]) & 0x3F) << 6) | (np.int64(text[at + 2]) & 0x3F), at + 3
    high = ((first & 0x07) << 18) | ((np.int64(text[at + 1]) & 0x3F) << 12)
    return high | ((np.int64(text[at + 2]) & 0x3F) << 6) | (np.int64(text[at + 3]) & 0x3F), at + 4


@compiled
@no_type_check
def _put(text, at, point):
    """Write a code point as UTF-8 and return where the next byte goes."""
    if point < 0x80:
        text[at] = point
        return at + 1
    if point < 0x800:
        text[at] = 0xC0 | (point >> 6)
        text[at + 1] = 0x80 | (point & 0x3F)
        return at + 2
    if point < 0x10000:
        text[at] = 0xE0 | (point >> 12)
        text[at + 1] = 0x80 | ((point >> 6) & 0x3F)
        text[at + 2] = 0x80 | (point & 0x3F)
        return at + 3
    text[at] = 0xF0 | (point >> 18)
    text[at + 1] = 0x80 | ((point >> 12) & 0x3F)
    text[at + 2] = 0x80 | ((point >> 6) & 0x3F)
    text[at + 3] = 0x80 | (point & 0x3F)
    return at + 4


@compiled
@no_type_check
def fast_buckets(text, begin, end, orders, buckets, kind, lower, ids, indptr, tokens, odd):
    """Buckets of every n-gram of every document by the fast hash; documents that need Python's lower case are marked in `odd`."""
    grams = np.zeros(orders, np.uint64)
    known = len(kind)
    many = np.uint64(buckets)
    at = 0
    for document in range(len(begin)):
        place, stop = begin[document], end[document]
        count, state, value = 0, 0, FNV_OFFSET
        indptr[document] = at
        while True:
            if place < stop:
                first = text[place]
                if first < 0x80:
                    now = np.int64(kind[first])
                    following = place + 1
                    point = np.int64(first)
                else:
                    point, following = _code_point(text, place)
                    now = np.int64(kind[point]) if point < known else 2
                    if point in (SIGMA, DOTTED_I):
                        odd[document] = True
            else:
                now = 0
                following = stop + 1
                point = 0
            if now != state and state != 0:
                token = _mixed(value)
                count += 1
                longest = min(orders, count)
                for order in range(longest - 1, 0, -1):
                    grams[order] = _mixed(grams[order - 1] * GOLDEN + token)
                grams[0] = token
                for order in range(longest):
                    ids[at] = ((grams[order] >> U32) * many) >> U32
                    at += 1
                value = FNV_OFFSET
            if place >= stop:
                break
            state = now
            if now != 0:
                if point < 0x80:
                    value = (value ^ np.uint64(lower[point])) * FNV_PRIME
                else:
                    # Lower case of what is no ASCII, hashed as its UTF-8 bytes.
                    small = np.int64(lower[point]) if point < known else point
                    if small < 0x80:
                        value = (value ^ np.uint64(small)) * FNV_PRIME
                    elif small < 0x800:
                        value = (value ^ np.uint64(0xC0 | (small >> 6))) * FNV_PRIME
                        value = (value ^ np.uint64(0x80 | (small & 0x3F))) * FNV_PRIME
                    elif small < 0x10000:
                        value = (value ^ np.uint64(0xE0 | (small >> 12))) * FNV_PRIME
                        value = (value ^ np.uint64(0x80 | ((small >> 6) & 0x3F))) * FNV_PRIME
                        value = (value ^ np.uint64(0x80 | (small & 0x3F))) * FNV_PRIME
                    else:
                        value = (value ^ np.uint64(0xF0 | (small >> 18))) * FNV_PRIME
                        value = (value ^ np.uint64(0x80 | ((small >> 12) & 0x3F))) * FNV_PRIME
                        value = (value ^ np.uint64(0x80 | ((small >> 6) & 0x3F))) * FNV_PRIME
                        value = (value ^ np.uint64(0x80 | (small & 0x3F))) * FNV_PRIME
            place = following
        tokens[document] = count
    indptr[len(begin)] = at
    return at


@compiled
@no_type_check
def _rotated(value, by):
    return np.uint32((value >> np.uint32(by)) | (value << np.uint32(32 - by)))


@compiled
@no_type_check
def sha256_bucket(text, begin, end, buckets, words, state):
    """int(sha256(text[begin:end]), 16) % buckets; `words` (64) and `state` (8) are room to work in."""
    length = end - begin
    for i in range(8):
        state[i] = START[i]
    for block in range((length + 9 + 63) // 64):
        origin = begin + 64 * block
        for i in range(16):
            words[i] = np.uint32(0)
        present = min(64, max(0, end - origin))
        for i in range(present):
            words[i >> 2] |= np.uint32(np.uint32(text[origin + i]) << np.uint32(24 - 8 * (i & 3)))
        if 0 <= end - origin < 64:
            words[present >> 2] |= np.uint32(np.uint32(0x80) << np.uint32(24 - 8 * (present & 3)))
        if 64 * block + 64 >= length + 9:
            words[14] = np.uint32((8 * length) >> 32)
            words[15] = np.uint32((8 * length) & 0xFFFFFFFF)
        for i in range(16, 64):
            x, y = words[i - 15], words[i - 2]
            small = _rotated(x, 7) ^ _rotated(x, 18) ^ (x >> np.uint32(3))
            large = _rotated(y, 17) ^ _rotated(y, 19) ^ (y >> np.uint32(10))
            words[i] = np.uint32(words[i - 16] + small + words[i - 7] + large)
        a, b, c, d = state[0], state[1], state[2], state[3]
        e, f, g, h = state[4], state[5], state[6], state[7]
        for i in range(64):
            one = np.uint32(h + (_rotated(e, 6) ^ _rotated(e, 11) ^ _rotated(e, 25)) + (g ^ (e & (f ^ g))) + ROUNDS[i] + words[i])
            two = np.uint32((_rotated(a, 2) ^ _rotated(a, 13) ^ _rotated(a, 22)) + ((a & b) | (c & (a | b))))
            h = g
            g = f
            f = e
            e = np.uint32(d + one)
            d = c
            c = b
            b = a
            a = np.uint32(one + two)
        state[0] = np.uint32(state[0] + a)
        state[1] = np.uint32(state[1] + b)
        state[2] = np.uint32(state[2] + c)
        state[3] = np.uint32(state[3] + d)
        state[4] = np.uint32(state[4] + e)
        state[5] = np.uint32(state[5] + f)
        state[6] = np.uint32(state[6] + g)
        state[7] = np.uint32(state[7] + h)
    many = np.uint64(buckets)
    if many & (many - np.uint64(1)) == np.uint64(0):
        return np.int64(np.uint64(state[7]) & (many - np.uint64(1)))  # m is a power of two: its last bits are in the last word
    rest = np.uint64(0)
    for i in range(8):
        rest = ((rest << U32) | np.uint64(state[i])) % many
    return np.int64(rest)


@intrinsic
@no_type_check
def _eight(typing_context, array, place):
    """The eight bytes array[place : place + 8] as one number; they need not be aligned."""
    signature = types.uint64(array, place)

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        where = builder.bitcast(builder.gep(data, [arguments[1]]), context.get_value_type(types.uint64).as_pointer())
        return builder.load(where, align=1)

    return signature, generate


@compiled
@no_type_check
def exact_buckets(text, begin, end, orders, buckets, kind, lower, ids, indptr, tokens, odd, memo, scratch, spans):
    """As `fast_buckets` with SHA-256; returns (n-grams, how many had to be hashed, a number of no use).

    `scratch` holds a document's tokens, `spans` where each n-gram lies in it. The memo is larger than the caches: all entries of a
    document are asked for before any is used, so that memory answers many questions at a time.
    """
    grams = np.zeros(orders, np.uint64)
    starts = np.zeros(orders, np.int64)  # where the last tokens begin in the scratch, a ring
    words, work = np.zeros(64, np.uint32), np.zeros(8, np.uint32)
    known = len(kind)
    slots = len(memo) - 1
    at, missed, asked = 0, 0, np.uint64(0)
    for document in range(len(begin)):
        place, stop = begin[document], end[document]
        count, state, value = 0, 0, FNV_OFFSET
        written, token_start, found = 0, 0, 0
        indptr[document] = at
        while True:
            if place < stop:
                first = text[place]
                if first < 0x80:
                    now = np.int64(kind[first])
                    following = place + 1
                    point = np.int64(first)
                else:
                    point, following = _code_point(text, place)
                    now = np.int64(kind[point]) if point < known else 2
                    if point in (SIGMA, DOTTED_I):
                        odd[document] = True
            else:
                now = 0
                following = stop + 1
                point = 0
            if now != state and state != 0:
                starts[count % orders] = token_start
                count += 1
                longest = min(orders, count)
                for order in range(longest - 1, 0, -1):
                    grams[order] = _mixed(grams[order - 1] * GOLDEN + value)
                grams[0] = _mixed(value)
                for order in range(longest):
                    spans[found, 0] = starts[(count - 1 - order) % orders]
                    spans[found, 1] = written
                    spans[found, 2] = np.int64(grams[order] >> np.uint64(8)) & slots
                    found += 1
                scratch[written] = 32
                written += 1
                token_start = written
                value = FNV_OFFSET
            if place >= stop:
                break
            state = now
            if now != 0:
                small = np.int64(lower[point]) if point < known else point
                value = (value ^ np.uint64(small)) * FNV_PRIME
                if small < 0x80:
                    scratch[written] = small
                    written += 1
                else:
                    written = _put(scratch, written, small)
            place = following
        tokens[document] = count
        for i in range(found):
            asked ^= memo[spans[i, 2], KEY_WORDS]
        for i in range(found):
            # Not a function of its own: arrays that are handed over are counted, which takes longer than the look-up.
            origin, slot = spans[i, 0], spans[i, 2]
            length = spans[i, 1] - origin
            whole = length >> 3
            mask = (np.uint64(1) << np.uint64(8 * (length & 7))) - np.uint64(1)
            fits = length < 8 * KEY_WORDS
            differ = (memo[slot, KEY_WORDS] >> U32) ^ np.uint64(length)
            if fits:
                for j in range(whole):
                    differ |= memo[slot, j] ^ _eight(scratch, origin + 8 * j)
                differ |= (memo[slot, whole] ^ _eight(scratch, origin + 8 * whole)) & mask
                if differ == np.uint64(0):
                    ids[at] = np.int64(memo[slot, KEY_WORDS] & LOW)
                    at += 1
                    continue
            bucket = sha256_bucket(scratch, origin, origin + length, buckets, words, work)
            if fits:
                for j in range(whole + 1):
                    memo[slot, j] = _eight(scratch, origin + 8 * j)
                memo[slot, KEY_WORDS] = np.uint64(bucket) | (np.uint64(length) << U32)
            ids[at] = bucket
            at += 1
            missed += 1
    indptr[len(begin)] = at
    return at, missed, asked


@compiled
@no_type_check
def add_rows(ids, indptr, first, rows, sign):
    """Add `sign` to the counts of documents first, first + 1, ... in the rows of a dense matrix."""
    for row in range(len(rows)):
        if first + row + 1 >= len(indptr):
            break
        for i in range(indptr[first + row], indptr[first + row + 1]):
            if sign > 0:
                rows[row, ids[i]] += 1.0
            else:
                rows[row, ids[i]] = 0.0


@compiled
@no_type_check
def _hexadecimal(byte):
    if 48 <= byte <= 57:
        return byte - 48
    if 65 <= byte <= 70:
        return byte - 55
    if 97 <= byte <= 102:
        return byte - 87
    return -1


@compiled
@no_type_check
def _four(text, at, stop):
    """The number of four hexadecimal digits, or -1."""
    if at + 4 > stop:
        return -1
    number = 0
    for i in range(4):
        digit = _hexadecimal(np.int64(text[at + i]))
        if digit < 0:
            return -1
        number = (number << 4) | digit
    return number


@compiled
@no_type_check
def _string(text, at, stop, plain, to):
    """Copy a JSON string from its first byte on, without escapes: (behind the closing quote or -1, end of the copy, surrogates)."""
    lone = 0
    while at < stop:
        byte = text[at]
        if byte == 34:
            return at + 1, to, lone
        if byte < 32:
            return -1, to, lone
        if byte != 92:
            plain[to] = byte
            to += 1
            at += 1
            continue
        if at + 1 >= stop:
            return -1, to, lone
        byte = text[at + 1]
        at += 2
        if byte == 110:
            plain[to] = 10
        elif byte == 34 or byte == 92 or byte == 47:
            plain[to] = byte
        elif byte == 116:
            plain[to] = 9
        elif byte == 114:
            plain[to] = 13
        elif byte == 98:
            plain[to] = 8
        elif byte == 102:
            plain[to] = 12
        elif byte == 117:
            point = _four(text, at, stop)
            if point < 0:
                return -1, to, lone
            at += 4
            if 0xD800 <= point <= 0xDBFF and at + 6 <= stop and text[at] == 92 and text[at + 1] == 117:
                second = _four(text, at + 2, stop)
                if 0xDC00 <= second <= 0xDFFF:
                    point = 0x10000 + ((point - 0xD800) << 10) + (second - 0xDC00)
                    at += 6
            if 0xD800 <= point <= 0xDFFF:
                point = 0xFFFD
                lone += 1
            to = _put(plain, to, point)
            continue
        else:
            return -1, to, lone
        to += 1
    return -1, to, lone


@compiled
@no_type_check
def _blanks(text, at, stop):
    while at < stop and (text[at] == 32 or text[at] == 9 or text[at] == 13 or text[at] == 10):
        at += 1
    return at


@compiled
@no_type_check
def _digits(text, at, stop):
    while at < stop and 48 <= text[at] <= 57:
        at += 1
    return at


@compiled
@no_type_check
def _scalar(text, at, stop):
    """Behind a JSON number or literal, or -1 for anything that Python should look at."""
    if at + 4 <= stop and text[at] == 116 and text[at + 1] == 114 and text[at + 2] == 117 and text[at + 3] == 101:
        return at + 4
    if at + 4 <= stop and text[at] == 110 and text[at + 1] == 117 and text[at + 2] == 108 and text[at + 3] == 108:
        return at + 4
    if at + 5 <= stop and text[at] == 102 and text[at + 1] == 97 and text[at + 2] == 108 and text[at + 3] == 115 and text[at + 4] == 101:
        return at + 5
    origin = at
    if at < stop and text[at] == 45:
        at += 1
    digits = _digits(text, at, stop)
    if digits == at or (text[at] == 48 and digits > at + 1):
        return -1
    at = digits
    if at < stop and text[at] == 46:
        digits = _digits(text, at + 1, stop)
        if digits == at + 1:
            return -1
        at = digits
    if at < stop and (text[at] == 101 or text[at] == 69):
        at += 1
        if at < stop and (text[at] == 43 or text[at] == 45):
            at += 1
        digits = _digits(text, at, stop)
        if digits == at:
            return -1
        at = digits
    return at if at - origin < 4000 else -1  # Python refuses whole numbers of more than 4300 digits


@compiled
@no_type_check
def _field(text, at, stop, name, plain, to):
    """Find the text field of one JSON object: (status as in `extract`, begin and end of its copy in `plain`)."""
    at = _blanks(text, at, stop)
    if at == stop:
        return 3, to, to
    if text[at] != 123:
        return 2, to, to
    at += 1
    depth, objects = 1, np.uint64(1)  # a bit for each open container: 1 for an object
    expect = 0  # 0: key or end, 1: key, 2: value, 3: comma or end, 4: value or end of an array
    wanted, status, begin, finish = False, 2, to, to
    while depth:
        at = _blanks(text, at, stop)
        if at >= stop:
            return 2, to, to
        byte = text[at]
        inside = (objects & np.uint64(1)) == np.uint64(1)
        if (expect == 0 and byte == 125) or (expect == 4 and byte == 93) or (expect == 3 and byte == (125 if inside else 93)):
            at += 1
            depth -= 1
            objects >>= np.uint64(1)
            expect = 3
        elif expect == 3:
            if byte != 44:
                return 2, to, to
            at += 1
            expect = 1 if inside else 2
        elif expect <= 1:
            if byte != 34:
                return 2, to, to
            key = at + 1
            at, behind, _ = _string(text, key, stop, plain, finish)
            if at < 0:
                return 2, to, to
            wanted = depth == 1 and behind - finish == len(name)
            if wanted:
                for i in range(len(name)):
                    if plain[finish + i] != name[i]:
                        wanted = False
                        break
            at = _blanks(text, at, stop)
            if at >= stop or text[at] != 58:
                return 2, to, to
            at += 1
            expect = 2
        else:
            if byte == 34:
                at, behind, lone = _string(text, at + 1, stop, plain, finish)
                if at < 0:
                    return 2, to, to
                if wanted:
                    begin, finish = finish, behind  # a field given twice: the last one counts, as for Python
                    status = 1 if lone else 0
                expect = 3
            elif wanted:
                return 2, to, to
            elif byte == 123 or byte == 91:
                if depth >= 60:
                    return 2, to, to
                at += 1
                depth += 1
                objects = (objects << np.uint64(1)) | np.uint64(1 if byte == 123 else 0)
                expect = 0 if byte == 123 else 4
            else:
                at = _scalar(text, at, stop)
                if at < 0:
                    return 2, to, to
                expect = 3
            wanted = False
    if _blanks(text, at, stop) != stop:
        return 2, to, to
    return status, begin, finish


@compiled
@no_type_check
def extract(text, starts, stops, name, plain, begin, end, status):
    """Texts of JSON lines into `plain`. Status 0: found; 1: found, with lone surrogates replaced; 2: Python must look; 3: blank."""
    to = 0
    for line in range(len(starts)):
        state, first, last = _field(text, starts[line], stops[line], name, plain, to)
        status[line] = state
        begin[line] = first
        end[line] = last
        if state < 2:
            to = last
    return to
