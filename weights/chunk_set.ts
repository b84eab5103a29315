/** A set of a file's chunks, a bit each. */
export class ChunkSet {
  readonly count: number;
  readonly #bits: Uint8Array<ArrayBuffer>;

  /** @param bits As {@linkcode ChunkSet.toBytes} gives it; not as long, it counts as empty. */
  constructor(count: number, bits?: Uint8Array) {
    this.count = count;
    const bytes = Math.ceil(count / 8);
    this.#bits = bits?.byteLength === bytes ? Uint8Array.from(bits) : new Uint8Array(bytes);
  }

  has(chunk: number): boolean {
    return (this.#bits[chunk >> 3]! >> (chunk & 7) & 1) === 1;
  }

  add(chunk: number): void {
    this.#bits[chunk >> 3]! |= 1 << (chunk & 7);
  }

  delete(chunk: number): void {
    this.#bits[chunk >> 3]! &= ~(1 << (chunk & 7));
  }

  clear(): void {
    this.#bits.fill(0);
  }

  /** The ranges that are in it, end exclusive. */
  ranges(): [number, number][] {
    const ranges: [number, number][] = [];
    for (let chunk = 0; chunk < this.count; chunk++) {
      if (!this.has(chunk)) continue;
      const first = chunk;
      while (chunk < this.count && this.has(chunk)) chunk++;
      ranges.push([first, chunk]);
    }
    return ranges;
  }

  toBytes(): Uint8Array<ArrayBuffer> {
    return this.#bits.slice();
  }
}
