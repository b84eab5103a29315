/** A piece of text that may be shown, and the stop string behind it, if one was found. */
export interface StopMatch {
  text: string;
  stop?: string;
}

/**
 * Looks for stop strings in a text that comes in pieces. It holds back only what may be the beginning of a stop string, and
 * never lets any of one out. The stop string that begins first wins, the longest of those that begin together… at one place.
 */
export class StopMatcher {
  readonly #stops: readonly string[];
  #held = "";
  #stopped = false;

  constructor(stops: readonly string[]) {
    this.#stops = stops.filter((stop) => stop !== "");
  }

  /** Takes a piece. After a stop string was found all further text is dropped. */
  push(piece: string): StopMatch {
    if (this.#stopped) return { text: "" };
    this.#held += piece;
    let first = Infinity;
    let found: string | undefined;
    for (const stop of this.#stops) {
      const at = this.#held.indexOf(stop);
      if (at >= 0 && at < first) [first, found] = [at, stop];
    }
    if (found !== undefined) {
      const text = this.#held.slice(0, first);
      this.#held = "";
      this.#stopped = true;
      return { text, stop: found };
    }
    let hold = 0;
    for (const stop of this.#stops) {
      for (let n = Math.min(stop.length - 1, this.#held.length); n > hold; n--) {
        if (this.#held.endsWith(stop.slice(0, n))) hold = n;
      }
    }
    const cut = this.#held.length - hold;
    const text = this.#held.slice(0, cut);
    this.#held = this.#held.slice(cut);
    return { text };
  }

  /** Ends the text and returns what was held back. */
  flush(): string {
    const text = this.#held;
    this.#held = "";
    return text;
  }
}
