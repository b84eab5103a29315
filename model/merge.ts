import { Heap } from "./heap.ts";

interface Candidate {
  readonly left: number;
  readonly right: number;
  readonly length: number;
  readonly rank: number;
}

/**
 * Merges neighbouring pieces of a text, best pair first, the leftmost on ties, until no pair can be merged. O(n log n).
 *
 * @param pieces The text's pieces.
 * @param rank The rank of a pair, lower is better; `undefined` when it cannot be merged.
 */
export function mergePieces(
  pieces: readonly string[],
  rank: (left: string, right: string) => number | undefined,
): string[] {
  const text = [...pieces];
  const next = text.map((_, i) => (i + 1 < text.length ? i + 1 : -1));
  const previous = text.map((_, i) => i - 1);
  const queue = new Heap<Candidate>((a, b) => a.rank < b.rank || (a.rank === b.rank && a.left < b.left));
  const consider = (left: number, right: number) => {
    if (left < 0 || right < 0) return;
    const r = rank(text[left]!, text[right]!);
    if (r !== undefined) queue.push({ left, right, length: text[left]!.length + text[right]!.length, rank: r });
  };
  for (let i = 0; i + 1 < text.length; i++) consider(i, i + 1);
  for (let best = queue.pop(); best !== undefined; best = queue.pop()) {
    const { left, right, length } = best;
    // Either side has been merged since (an empty text marks the right half of a merge).
    if (text[left] === "" || text[right] === "" || text[left]!.length + text[right]!.length !== length) continue;
    text[left] += text[right]!;
    text[right] = "";
    const after = next[right]!;
    next[left] = after;
    if (after >= 0) previous[after] = left;
    consider(previous[left]!, left);
    consider(left, after);
  }
  return text.filter((piece) => piece !== "");
}
