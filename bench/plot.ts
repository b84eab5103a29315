import type { CostRow, KernelRow, PeerRow } from "./rows.ts";
import { costFits } from "./tables.ts";

/** Colours that keep apart on white and for most eyes (Okabe and Ito). */
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"];
const WIDTH = 860;
const FONT = 'font-family="sans-serif" font-size="12"';

const escape = (text: string) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function text(x: number, y: number, content: string, anchor: "start" | "middle" | "end" = "start"): string {
  return `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" text-anchor="${anchor}">${escape(content)}</text>`;
}

function document(height: number, title: string, parts: readonly string[]): string {
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" ${FONT}>`,
    `<rect width="${WIDTH}" height="${height}" fill="white"/>`,
    `<text x="12" y="22" font-size="15" font-weight="bold">${escape(title)}</text>`,
    ...parts,
    "</svg>\n",
  ].join("\n");
}

/** A row of a bar chart: its label and a value for each series; null draws nothing. */
export interface Bars {
  readonly label: string;
  readonly values: readonly (number | null)[];
}

/** Horizontal bars, grouped by row. `mark`: a value that a dashed line is drawn at. */
export function drawBars(
  title: string,
  series: readonly string[],
  rows: readonly Bars[],
  options: { mark?: number; format?: (value: number) => string } = {},
): string {
  const { mark, format = (value) => value.toFixed(2) } = options;
  const [left, right, bar] = [150, 70, 13];
  const most = Math.max(mark ?? 0, ...rows.flatMap((row) => row.values.map((value) => value ?? 0))) || 1;
  const x = (value: number) => left + ((WIDTH - left - right) * value) / most;
  const parts: string[] = [];
  series.forEach((name, i) => {
    parts.push(`<rect x="${12 + 140 * i}" y="34" width="11" height="11" fill="${COLOURS[i % COLOURS.length]}"/>`);
    parts.push(text(28 + 140 * i, 44, name));
  });
  let y = 62;
  for (const row of rows) {
    const shown = row.values.flatMap((value, i) => value === null ? [] : [[value, i] as const]);
    parts.push(text(left - 8, y + (bar * shown.length) / 2 + 4, row.label, "end"));
    for (const [value, i] of shown) {
      const width = (x(value) - left).toFixed(1);
      parts.push(
        `<rect x="${left}" y="${y}" width="${width}" height="${bar - 2}" fill="${COLOURS[i % COLOURS.length]}"/>`,
      );
      parts.push(text(x(value) + 4, y + bar - 3, format(value)));
      y += bar;
    }
    y += 8;
  }
  if (mark !== undefined) {
    const at = x(mark).toFixed(1);
    parts.push(`<line x1="${at}" y1="54" x2="${at}" y2="${y}" stroke="#444" stroke-dasharray="4 3"/>`);
  }
  return document(y + 8, title, parts);
}

/** How many times llama.cpp's speed Lutra has, per type, phase and number of threads. */
export function drawRatios(rows: readonly PeerRow[]): string {
  const key = (r: PeerRow) => `${r.phase}, ${r.threads} thread${r.threads > 1 ? "s" : ""}`;
  const series = [...new Set(rows.map(key))];
  const types = [...new Set(rows.map((r) => r.type))];
  const bars = types.map((label) => ({
    label,
    values: series.map((name) => rows.find((r) => r.type === label && key(r) === name)?.ratio ?? null),
  }));
  return drawBars("Speed as a multiple of llama.cpp's", series, bars, { mark: 1 });
}

/** Decode's share of read bandwidth, per form, of the preferred kernels of the best instruction set. */
export function drawShares(rows: readonly KernelRow[]): string {
  const best = rows.at(-1)?.isa;
  const decode = rows.filter((r) => r.batch === 1 && r.preferred && r.isa === best && r.share !== null);
  const threads = [...new Set(decode.map((r) => r.threads))];
  const forms = [...new Set(decode.map((r) => r.form))];
  const bars = forms.map((form) => {
    const own = decode.filter((r) => r.form === form);
    const values = threads.map((n) => own.find((r) => r.threads === n)?.share ?? null);
    return { label: `${form} (${own[0]!.bits.toFixed(2)} bits)`, values };
  });
  const series = threads.map((n) => `${n} thread${n > 1 ? "s" : ""}`);
  const format = (share: number) => `${(100 * share).toFixed(0)} %`;
  return drawBars(`Batch 1: share of read bandwidth (${best ?? "no data"})`, series, bars, { mark: 1, format });
}

/** Picoseconds a weight by bits, with the fitted line of each instruction set. */
export function drawCostLaw(rows: readonly CostRow[]): string {
  const [left, top, bottom, right] = [60, 60, 380, 240];
  const bits = Math.max(1, ...rows.map((r) => r.bits));
  const most = 1.1 * Math.max(1e-9, ...rows.map((r) => 1000 * r.nanoseconds));
  const x = (value: number) => left + ((WIDTH - left - right) * value) / (bits + 0.5);
  const y = (value: number) => bottom - ((bottom - top) * value) / most;
  const parts = [
    `<path d="M${left} ${top}V${bottom}H${WIDTH - right}" fill="none" stroke="#444"/>`,
    text(left, bottom + 34, "bits of a weight"),
    text(12, top - 14, "ps a weight, one thread, in cache, one activation row"),
  ];
  for (let n = 0; n <= bits; n++) parts.push(text(x(n), bottom + 16, `${n}`, "middle"));
  for (let i = 0; i <= 4; i++) {
    const value = (most * i) / 4;
    parts.push(text(left - 6, y(value) + 4, value.toFixed(1), "end"));
  }
  costFits(rows).forEach(({ isa, kernel, slope, intercept }, i) => {
    const colour = COLOURS[i % COLOURS.length];
    const end = bits + 0.3;
    const line = [x(0), y(intercept), x(end), y(intercept + slope * end)].map((at) => at.toFixed(1));
    parts.push(`<line x1="${line[0]}" y1="${line[1]}" x2="${line[2]}" y2="${line[3]}" stroke="${colour}"/>`);
    for (const row of rows.filter((row) => row.isa === isa && row.kernel === kernel)) {
      const at = `cx="${x(row.bits).toFixed(1)}" cy="${y(1000 * row.nanoseconds).toFixed(1)}"`;
      parts.push(`<circle ${at} r="4" fill="${colour}"/>`);
    }
    const name = `${isa} ${kernel}: ${slope.toFixed(2)}·bits ${intercept < 0 ? "−" : "+"} ${
      Math.abs(intercept).toFixed(2)
    }`;
    parts.push(`<rect x="${WIDTH - right + 14}" y="${top + 20 * i}" width="11" height="11" fill="${colour}"/>`);
    parts.push(text(WIDTH - right + 30, top + 10 + 20 * i, name));
  });
  return document(bottom + 46, "The cost law: table look-up", parts);
}
