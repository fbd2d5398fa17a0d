/* Codes of fewer than 8 bits as the lanes take them: code + 32, 0..63, in the order of ENCODING_INT8. */

#define MAX_GROUP 256

/* Columns 8 c to 8 c + 7 of a tile of 4 or 6 bits: 4 of each row in codes[0], 4 in codes[1]. `crumbs`: the
   line of 2 high bits that these columns share with 8 others. odd: they are the second 8 of 16. */
INLINE void u6_columns(const Encoding encoding, u6x64 codes[2], const uint8_t *nibbles, u6x64 codebook,
                       u6x64 crumbs, const int odd) {
    u6x64 both = u6_load(nibbles);
    UNROLL for (int i = 0; i < 2; i++) {
        codes[i] = u6_nibbles(both, i);
        codes[i] = encoding == ENCODING_INT4 ? u6_look_up(codebook, codes[i])
                                             : u6_join(codes[i], crumbs, 2 * odd + i);
    }
}

/* The codebook of a tile row of ENCODING_INT4 whose first tile is given. */
INLINE u6x64 u6_codebook_of(const uint8_t *tiles) {
    return u6_codebook((const int8_t *)tiles - CODEBOOK_BYTES);
}

/* The high bits of columns 16 c to 16 c + 15 of a tile of ENCODING_INT6. */
INLINE u6x64 u6_crumbs(const uint8_t *tile, size_t c, size_t group_size) {
    return u6_load(tile + LANES * group_size / 2 + c * (4 * LANES));
}

/* Codes of a tile of 4 or 6 bits as int8 (group_size / 4, LANES, 4). */
INLINE void unpack_tile(const Encoding encoding, int8_t *codes, const uint8_t *tile, u6x64 codebook,
                        size_t group_size) {
    for (size_t c = 0; c < group_size; c += 16) {
        u6x64 crumbs;
        if (encoding == ENCODING_INT6) crumbs = u6_crumbs(tile, c / 16, group_size);
        UNROLL for (int odd = 0; odd < 2; odd++) {
            size_t at = c + 8 * (size_t)odd;
            u6x64 unpacked[2];
            u6_columns(encoding, unpacked, tile + at * (LANES / 2), codebook, crumbs, odd);
            u6_store_centred(codes + at * LANES, unpacked[0]);
            u6_store_centred(codes + (at + 4) * LANES, unpacked[1]);
        }
    }
}

/* Where a tile's codes are as int8: in place, or in `room` (MAX_GROUP * LANES) after they were unpacked. */
INLINE const int8_t *tile_codes(const Encoding encoding, int8_t *room, const uint8_t *tile,
                                const int8_t *codebook, size_t group_size) {
    if (encoding == ENCODING_INT8) return (const int8_t *)tile;
    u6x64 entries;
    if (encoding == ENCODING_INT4) entries = u6_codebook(codebook);
    unpack_tile(encoding, room, tile, entries, group_size);
    return room;
}

/* The code at a row and column of a tile. */
INLINE int code_at(const Encoding encoding, const uint8_t *tile, const int8_t *codebook, size_t group_size,
                   size_t row, size_t column) {
    size_t lane = row * 4 + column % 4;
    if (encoding == ENCODING_INT8) return ((const int8_t *)tile)[column / 4 * (LANES * 4) + lane];
    int nibble = tile[column / 8 * (LANES * 4) + lane] >> column / 4 % 2 * 4 & 15;
    if (encoding == ENCODING_INT4) return ((codebook[nibble] + 32) & 63) - 32;
    int crumb = tile[LANES * group_size / 2 + column / 16 * (LANES * 4) + lane] >> column / 4 % 4 * 2 & 3;
    return nibble + crumb * 16 - 32;
}
