/**
 * Tells which step numbers were seen, in memory that does not grow: of the newest `window` numbers exactly, and of all older
 * ones that they count as seen. Steps may arrive a little out of order and more than once.
 */
export class SeenSteps {
  readonly #window: number;
  readonly #seen = new Set<number>();
  #newest = -1;

  constructor(window = 1024) {
    this.#window = window;
  }

  /** Notes `step`; false when it was seen before or is too old to tell. */
  add(step: number): boolean {
    if (step <= this.#newest - this.#window || this.#seen.has(step)) return false;
    this.#seen.add(step);
    if (step > this.#newest) {
      this.#newest = step;
      // Insertion order is nearly numeric order: the oldest numbers are found at the front.
      for (const old of this.#seen) {
        if (old > step - this.#window) break;
        this.#seen.delete(old);
      }
    }
    return true;
  }

  /** Numbers held. */
  get size(): number {
    return this.#seen.size;
  }
}

/** The newest `capacity` numbers added. */
export class RecentSet {
  readonly #capacity: number;
  readonly #numbers = new Set<number>();

  constructor(capacity = 1 << 16) {
    this.#capacity = capacity;
  }

  add(value: number): void {
    this.#numbers.add(value);
    if (this.#numbers.size > this.#capacity) {
      for (const oldest of this.#numbers) {
        this.#numbers.delete(oldest);
        break;
      }
    }
  }

  has(value: number): boolean {
    return this.#numbers.has(value);
  }
}
