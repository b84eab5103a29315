import { table } from "../cli/inspect.ts";
import type { ClusterRow, CostFit, CostRow, KernelRow, PeerRow } from "./rows.ts";
import { fitLine } from "./stats.ts";

const percent = (share: number | null) => share === null ? "" : `${(100 * share).toFixed(0)} %`;

/** Rows against the peer, as people read them. */
export function describePeer(rows: readonly PeerRow[]): string[] {
  return table(
    ["type", "phase", "threads", "batch", "lutra tok/s", "peer tok/s", "ratio", "GB/s", "bandwidth", "share"],
    rows.map((r) => [
      r.type,
      r.phase,
      `${r.threads}`,
      `${r.batch}`,
      r.lutra.toFixed(1),
      r.peer.toFixed(1),
      r.ratio.toFixed(2),
      r.gbps?.toFixed(1) ?? "",
      r.bandwidth?.toFixed(1) ?? "",
      percent(r.share),
    ]),
  );
}

/** Rows of kernels, as people read them. */
export function describeKernels(rows: readonly KernelRow[]): string[] {
  return table(
    ["form", "codes", "kernel", "isa", "threads", "batch", "bits", "Gw/s", "GB/s", "bandwidth", "share", "cached Gw/s"],
    rows.map((r) => [
      r.form,
      r.codes,
      `${r.kernel}${r.preferred ? " *" : ""}`,
      r.isa,
      `${r.threads}`,
      `${r.batch}`,
      r.bits.toFixed(3),
      r.gweights.toFixed(1),
      r.gbps.toFixed(1),
      r.bandwidth?.toFixed(1) ?? "",
      percent(r.share),
      r.cachedGweights.toFixed(1),
    ]),
  );
}

/** The cost law's points, as people read them. */
export function describeCost(rows: readonly CostRow[]): string[] {
  return table(
    ["isa", "kernel", "bits", "ps/weight"],
    rows.map((r) => [r.isa, r.kernel, `${r.bits}`, (1000 * r.nanoseconds).toFixed(2)]),
  );
}

/** The line through each kernel's points. A kernel of one width alone has none. */
export function costFits(rows: readonly CostRow[]): CostFit[] {
  const groups = Map.groupBy(rows, ({ isa, kernel }) => `${isa} ${kernel}`);
  return [...groups.values()].filter((own) => own.length > 1).map((own) => ({
    isa: own[0]!.isa,
    kernel: own[0]!.kernel,
    ...fitLine(own.map((r) => [r.bits, 1000 * r.nanoseconds])),
  }));
}

/** Fits in words. */
export function describeFits(fits: readonly CostFit[]): string[] {
  return fits.map(({ isa, kernel, slope, intercept }) =>
    `${isa} ${kernel}: ${slope.toFixed(2)} ps/weight for each bit, and ${
      intercept.toFixed(2)
    } ps/weight whatever the bits`
  );
}

/** Pipelines against one worker, as people read them. */
export function describeCluster(rows: readonly ClusterRow[]): string[] {
  return table(
    [
      "phase",
      "replicas",
      "stages",
      "streams",
      "batch",
      "delay ms",
      "tok/s",
      "to one worker",
      "theory",
      "to one stream",
      "lane",
      "hop ms",
      "mean",
    ],
    rows.map((r) => [
      r.phase,
      `${r.replicas}`,
      `${r.stages}`,
      `${r.streams}`,
      r.batch === null ? "any" : `${r.batch}`,
      `${r.delay_ms}`,
      r.tok_s.toFixed(1),
      r.ratio.toFixed(2),
      r.theory.toFixed(2),
      r.ratio_one.toFixed(2),
      r.lane ? "yes" : "no",
      r.hop_ms?.toFixed(2) ?? "",
      r.hop_mean_ms?.toFixed(2) ?? "",
    ]),
  );
}
