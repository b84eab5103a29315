import { BusError, clusterSubjects, decodeProbeReply, WireError } from "../bus/mod.ts";
import type { Bus, Hello } from "../bus/mod.ts";

/** What a pipeline tells of its own work. */
export interface Activity {
  readonly epoch: number;
  /** Milliseconds so far in which micro-batches were on their way. */
  readonly activeMs: number;
}

interface Sample {
  readonly activeMs: number;
  readonly busyMs: number;
}

interface Device {
  /** Milliseconds of the last pings. */
  rtt: number[];
  epoch: number;
  samples: Sample[];
}

/** Pings whose median counts, and how many tell the shortest way. */
const PINGS = 8;
const FIRST_PINGS = 3;
/** A worker that answers later is not heard, and tells nothing. */
const PING_TIMEOUT_MS = 1000;
/** So many milliseconds of work tell the bubbles of late; of fewer than the second number they would be chance. */
const WINDOW_MS = 10_000;
const LEAST_MS = 100;

/**
 * How the workers do, from their heartbeats and from pings: time to each and back, and its share of bubbles, the time in
 * which the pipeline had work but this device did none.
 */
export class Telemetry {
  readonly #bus: Bus;
  readonly #subjects: ReturnType<typeof clusterSubjects>;
  readonly #devices = new Map<string, Device>();
  readonly #timer: ReturnType<typeof setInterval> | undefined;
  readonly #stop = new AbortController();

  /** @param pingMs Milliseconds between two pings of every worker; 0 pings none. */
  constructor(bus: Bus, cluster: string, pingMs: number) {
    this.#bus = bus;
    this.#subjects = clusterSubjects(cluster);
    if (pingMs > 0) {
      this.#timer = setInterval(() => {
        for (const id of this.#devices.keys()) void this.#ping(id);
      }, pingMs);
    }
  }

  /** Takes a worker's announcement. */
  take({ id, epoch, work }: Hello, activity: Activity | undefined): void {
    let device = this.#devices.get(id);
    if (device === undefined) {
      this.#devices.set(id, device = { rtt: [], epoch, samples: [] });
      if (this.#timer !== undefined) void this.#meet(id);
    }
    if (activity === undefined || activity.epoch !== epoch) return;
    if (device.epoch !== epoch) [device.epoch, device.samples] = [epoch, []];
    const { samples } = device;
    const sample = { activeMs: activity.activeMs, busyMs: work.stages.reduce((sum, { busyMs }) => sum + busyMs, 0) };
    // Without work nothing is learnt, and the last of it stays to be seen.
    if (sample.activeMs === samples.at(-1)?.activeMs) samples.pop();
    samples.push(sample);
    while (samples.length > 2 && sample.activeMs - samples[1]!.activeMs >= WINDOW_MS) samples.shift();
  }

  /** The shortest time to a worker and back of late, which says more of the way than of what else is done; `null` where not known. */
  shortest(id: string): number | null {
    const { rtt = [] } = this.#devices.get(id) ?? {};
    return rtt.length < FIRST_PINGS ? null : Math.min(...rtt);
  }

  /** Forgets a worker. */
  forget(id: string): void {
    this.#devices.delete(id);
  }

  /** Median time to a worker and back, and its share of bubbles; `null` where not known. */
  of(id: string): { rttMs: number | null; bubble: number | null } {
    const device = this.#devices.get(id);
    if (device === undefined) return { rttMs: null, bubble: null };
    const { rtt, samples } = device;
    const sorted = [...rtt].sort((a, b) => a - b);
    const [from, to] = [samples[0], samples.at(-1)];
    const active = from === undefined ? 0 : to!.activeMs - from.activeMs;
    return {
      rttMs: sorted[sorted.length >> 1] ?? null,
      bubble: active < LEAST_MS ? null : Math.min(1, Math.max(0, 1 - (to!.busyMs - from!.busyMs) / active)),
    };
  }

  /** Ends the pings. */
  close(): void {
    clearInterval(this.#timer);
    this.#stop.abort();
  }

  async #meet(id: string): Promise<void> {
    for (let i = 0; i < FIRST_PINGS; i++) await this.#ping(id);
  }

  async #ping(id: string): Promise<void> {
    const { signal } = this.#stop;
    const sent = performance.now();
    try {
      const answer = await this.#bus.request(this.#subjects.probe(id), new Uint8Array(), {
        timeoutMs: PING_TIMEOUT_MS,
        signal,
      });
      decodeProbeReply(answer.data, 0);
    } catch (error) {
      if (error instanceof BusError || error instanceof WireError || signal.aborted) return;
      throw error;
    }
    const device = this.#devices.get(id);
    if (device === undefined) return;
    device.rtt.push(performance.now() - sent);
    if (device.rtt.length > PINGS) device.rtt.shift();
  }
}
