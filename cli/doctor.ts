import type { Command } from "commander";
import {
  ABI_VERSION,
  anyHelloSchema,
  BusError,
  clusterSubjects,
  decodeJson,
  decodeProbeReply,
  diagnosisSchema,
  encodeJson,
  LUTRA_VERSION,
  NatsBus,
  NoRespondersError,
  PROBE_HEADER_BYTES,
  WIRE_VERSION,
  WireError,
} from "../bus/mod.ts";
import type { Finding } from "../bus/mod.ts";
import { ClusterError } from "../orchestrator/mod.ts";
import { deviceHealth, loadKernels, WorkerError } from "../worker/mod.ts";
import { cacheFolder, modelPath } from "./hub/reference.ts";
import { natsAddress, natsOptions, withNatsOptions } from "./nats_options.ts";
import type { NatsFlags } from "./nats_options.ts";
import { number } from "./options.ts";
import { clusterStatus } from "./status.ts";

interface DoctorFlags extends NatsFlags {
  wait: number;
  speed?: boolean;
  json?: boolean;
}

/** A finding and where it was made: this device, the server, the cluster, or a worker's id. */
interface Placed extends Finding {
  readonly where: string;
}

const HERE = "this device";
const TIMEOUT_MS = 3000;
const LEAST_SERVER = [2, 9];
/** From this one on JetStream forgets keys after their time, see {@linkcode NatsBus}. */
const KV_SERVER = [2, 11];
/** Hidden states of a token, and what goes with them, must fit; the pipeline is planned for the second number. */
const LEAST_PAYLOAD = 1 << 17;
const FULL_PAYLOAD = 1 << 20;
const CLOCK_WARNING_MS = 1000;
const CLOCK_FAILED_MS = 60_000;
const SLOW_RTT_MS = 5;
const SLOW_LINK_MBITS = 50;
/** The link's speed is measured by so many bytes at once, so many of these on their way, for so long. */
const PROBE_BYTES = 1 << 18;
const PROBES = 4;
const PROBE_MS = 700;

/** Adds the command `doctor`. */
export function addDoctor(program: Command): void {
  const command = program.command("doctor")
    .description("look for what holds this device or a cluster up, and say what to do about it")
    .argument("[model]", "a model that every device should be able to read")
    .option("--wait <seconds>", "how long to wait for workers to answer", number(0.1, 60), 1)
    .option("--no-speed", "do not measure the speed of the links, which takes a moment from running answers")
    .option("--json", "print JSON");
  withNatsOptions(command, "address of the cluster's NATS server; without one this device alone is looked at").action(
    async (model: string | undefined, flags: DoctorFlags) => {
      const findings: Placed[] = [];
      const show = (where: string, ...found: readonly Finding[]) => {
        for (const finding of found) {
          findings.push({ where, ...finding });
          if (flags.json !== true) console.log(describe({ where, ...finding }));
        }
      };
      show(HERE, ...await examineDevice(model));
      const address = natsAddress(flags);
      if (address !== undefined) await examineCluster(address, flags, model, show);
      const failed = findings.filter(({ state }) => state === "failed").length;
      if (flags.json === true) console.log(JSON.stringify({ ok: failed === 0, findings }));
      if (failed > 0) throw new ClusterError(`${failed} of ${findings.length} checks failed`);
    },
  );
}

function describe({ where, check, state, detail, fix }: Placed): string {
  const mark = { ok: "ok      ", warning: "warning ", failed: "FAILED  " }[state];
  return `${mark} ${where}, ${check}: ${detail}${fix === undefined ? "" : `\n         → ${fix}`}`;
}

async function examineDevice(model: string | undefined): Promise<Finding[]> {
  const findings: Finding[] = [{ check: "version", state: "ok", detail: `Lutra ${LUTRA_VERSION}` }];
  let cores: number | undefined;
  try {
    const info = loadKernels().deviceInfo();
    cores = info.cores;
    findings.push({ check: "kernels", state: "ok", detail: `${info.isa} on ${cores} cores` });
  } catch (error) {
    if (!(error instanceof WorkerError)) throw error;
    findings.push({ check: "kernels", state: "failed", detail: error.message, fix: "deno task build" });
  }
  const health = await deviceHealth({
    cores: cores ?? navigator.hardwareConcurrency,
    cacheFolder: cacheFolder(),
    ...(model === undefined ? {} : { model: modelPath(model) }),
  });
  // A worker may do without the file; what is named here should be here.
  return [
    ...findings,
    ...health.map((finding) =>
      finding.check === "model" && finding.state === "warning" ? { ...finding, state: "failed" as const } : finding
    ),
  ];
}

type Show = (where: string, ...found: readonly Finding[]) => void;

async function examineCluster(
  address: string,
  flags: DoctorFlags,
  model: string | undefined,
  show: Show,
): Promise<void> {
  let bus: NatsBus;
  try {
    bus = await NatsBus.connect({ ...natsOptions(flags, address), name: "lutra-doctor" });
  } catch (error) {
    if (!(error instanceof BusError)) throw error;
    const fix = /refuses these credentials/.test(error.message)
      ? "give the token, user, nkey or credentials that the server's configuration names (--help)"
      : "start it (`serve MODEL --nats embedded`, or `sudo systemctl start nats-server`) and let its port through the firewall";
    return show("server", { check: "connection", state: "failed", detail: error.message, fix });
  }
  try {
    show("server", ...serverFindings(bus));
    const { hellos, findings } = await listen(bus, flags);
    for (const [id, found] of findings) show(id, found);
    show("cluster", ...await absentMembers(bus, flags.cluster, hellos));
    for (const id of hellos) await examineWorker(bus, flags, id, model, show);
    show("cluster", ...await clusterFindings(bus, flags.cluster, hellos.length));
  } finally {
    await bus.close();
  }
}

function serverFindings(bus: NatsBus): Finding[] {
  const version = bus.serverVersion;
  const before = ([major, minor]: number[]) => {
    const [a = 0, b = 0] = version.split(".").map(Number);
    return a < major! || (a === major && b < minor!);
  };
  const payload = `messages of up to ${bus.maxPayload >> 10} KiB`;
  const findings: Finding[] = [
    before(LEAST_SERVER)
      ? {
        check: "version",
        state: "failed",
        detail: `nats-server ${version} is too old`,
        fix: `install ${LEAST_SERVER.join(".")} or newer`,
      }
      : { check: "version", state: "ok", detail: `nats-server ${version}` },
    bus.maxPayload >= FULL_PAYLOAD ? { check: "payload", state: "ok", detail: payload } : {
      check: "payload",
      state: bus.maxPayload < LEAST_PAYLOAD ? "failed" : "warning",
      detail: payload,
      fix: "set `max_payload: 1MB` in the server's configuration",
    },
  ];
  const check = "JetStream";
  if (before(KV_SERVER)) {
    const detail = `not used: nats-server before ${KV_SERVER.join(".")} keeps no keys for a time; heartbeats must do`;
    findings.push({ check, state: "ok", detail });
  } else if (bus.serverHasJetStream) findings.push({ check, state: "ok", detail: "on" });
  else {
    const detail = "off: nothing outlives all members, heartbeats must do";
    findings.push({ check, state: "warning", detail, fix: "add `jetstream {}` to the server's configuration" });
  }
  return findings;
}

/** Who announces itself within the time to wait, and what is wrong with their versions. */
async function listen(
  bus: NatsBus,
  { cluster, wait }: DoctorFlags,
): Promise<{ hellos: string[]; findings: [id: string, finding: Finding][] }> {
  const { hello, discover } = clusterSubjects(cluster);
  const versions = new Map<string, { abi: number; wire: number; lutra?: string | undefined }>();
  const subscription = bus.subscribe(hello, ({ data }) => {
    try {
      const { id, versions: its } = decodeJson(anyHelloSchema, data);
      versions.set(id, its);
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
    }
  });
  bus.publish(discover, new Uint8Array());
  await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
  subscription.unsubscribe();
  const findings: [string, Finding][] = [];
  const hellos: string[] = [];
  for (const [id, { abi, wire, lutra = "unknown" }] of [...versions].sort(([a], [b]) => a < b ? -1 : 1)) {
    const check = "version";
    const its = `Lutra ${lutra} (wire ${wire}, ABI ${abi})`;
    const ours = `${LUTRA_VERSION} (wire ${WIRE_VERSION}, ABI ${ABI_VERSION})`;
    const fix = `bring the older one up to date: git pull && deno task build`;
    if (wire !== WIRE_VERSION || abi !== ABI_VERSION) {
      findings.push([id, { check, state: "failed", detail: `${its}, here ${ours}: they cannot work together`, fix }]);
      continue;
    }
    hellos.push(id);
    if (lutra === LUTRA_VERSION) findings.push([id, { check, state: "ok", detail: its }]);
    else findings.push([id, { check, state: "warning", detail: `${its}, here ${ours}`, fix }]);
  }
  return { hellos, findings };
}

async function examineWorker(
  bus: NatsBus,
  { cluster, speed }: DoctorFlags,
  id: string,
  model: string | undefined,
  show: Show,
): Promise<void> {
  const subjects = clusterSubjects(cluster);
  const ask = async (subject: string, data: Uint8Array) =>
    (await bus.request(subject, data, { timeoutMs: TIMEOUT_MS })).data;
  try {
    show(id, ...await linkFindings((data) => ask(subjects.probe(id), data), bus.maxPayload, speed !== false));
    const request = encodeJson({ model: model === undefined ? null : modelPath(model) });
    show(id, ...decodeJson(diagnosisSchema, await ask(subjects.diagnose(id), request)).findings);
  } catch (error) {
    if (!(error instanceof BusError)) throw error;
    const fix = "look at the worker's own output there, and start it again";
    show(id, { check: "answer", state: "failed", detail: error.message, fix });
  }
}

/** Clock, way there and back, and speed of the link to a worker. */
async function linkFindings(
  probe: (data: Uint8Array) => Promise<Uint8Array>,
  maxPayload: number,
  speed: boolean,
): Promise<Finding[]> {
  const trips: { rtt: number; off: number }[] = [];
  for (let i = 0; i < 9; i++) {
    const [sent, started] = [Date.now(), performance.now()];
    const clock = decodeProbeReply(await probe(new Uint8Array()), 0);
    const rtt = performance.now() - started;
    trips.push({ rtt, off: clock - (sent + rtt / 2) });
  }
  trips.sort((a, b) => a.rtt - b.rtt);
  const { rtt } = trips[trips.length >> 1]!;
  const { off } = trips[0]!; // the fastest trip tells the time best
  const away = Math.abs(off);
  const shown = `${away < 1000 ? `${away.toFixed(0)} ms` : `${(away / 1000).toFixed(1)} s`} ${
    off < 0 ? "behind" : "ahead of"
  } this one`;
  const findings: Finding[] = [
    away < CLOCK_WARNING_MS ? { check: "clock", state: "ok", detail: shown } : {
      check: "clock",
      state: away < CLOCK_FAILED_MS ? "warning" : "failed",
      detail: `${shown}: certificates may count as not valid yet, or no longer`,
      fix: "set both by the network: sudo timedatectl set-ntp true",
    },
  ];
  const way = `${rtt.toFixed(2)} ms there and back`;
  const cable = "use a cable and a switch rather than Wi-Fi";
  findings.push(
    rtt < SLOW_RTT_MS
      ? { check: "hop", state: "ok", detail: way }
      : { check: "hop", state: "warning", detail: `${way}: every token takes that once a stage`, fix: cable },
  );
  if (!speed) return findings;
  const mbits = await linkSpeed(probe, Math.min(PROBE_BYTES, maxPayload - PROBE_HEADER_BYTES));
  const rate = `${mbits.toFixed(0)} Mbit/s each way`;
  findings.push(
    mbits >= SLOW_LINK_MBITS
      ? { check: "link", state: "ok", detail: rate }
      : { check: "link", state: "warning", detail: `${rate}: prompts and weights travel slowly`, fix: cable },
  );
  return findings;
}

/** Sends bytes to a worker, which sends them back, and returns the Mbit/s of either direction. */
async function linkSpeed(probe: (data: Uint8Array) => Promise<Uint8Array>, size: number): Promise<number> {
  const data = crypto.getRandomValues(new Uint8Array(Math.min(size, 1 << 16)));
  const message = new Uint8Array(size);
  for (let at = 0; at < size; at += data.length) message.set(data.subarray(0, size - at), at);
  const started = performance.now();
  let bytes = 0;
  const send = async () => {
    do {
      decodeProbeReply(await probe(message), size);
      bytes += size;
    } while (performance.now() - started < PROBE_MS);
  };
  await Promise.all(Array.from({ length: PROBES }, send));
  return 8 * bytes / 1000 / (performance.now() - started);
}

/** Who belongs to the cluster by the server's store, but does not announce itself. */
async function absentMembers(bus: NatsBus, cluster: string, hellos: readonly string[]): Promise<Finding[]> {
  try {
    const members = await bus.store(cluster)?.members() ?? [];
    return members.filter((id) => !hellos.includes(id)).map((id) => ({
      check: "member",
      state: "warning",
      detail: `${id} belongs to the cluster, but does not answer`,
      fix: "it ended a moment ago, or hangs: look at it there",
    }));
  } catch (error) {
    if (!(error instanceof BusError)) throw error;
    const fix = "let this account use JetStream, or turn it off";
    return [{ check: "JetStream", state: "warning", detail: error.message, fix }];
  }
}

async function clusterFindings(bus: NatsBus, cluster: string, workers: number): Promise<Finding[]> {
  const findings: Finding[] = [
    workers > 0 ? { check: "workers", state: "ok", detail: `${workers} answer` } : {
      check: "workers",
      state: "warning",
      detail: `none answers in cluster ${cluster}`,
      fix: "start `worker --nats …` on a device; --cluster must be the same everywhere",
    },
  ];
  const check = "orchestrator";
  try {
    const { model, state, reason, workers: members } = await clusterStatus(bus, cluster);
    const serving = state === "serving";
    findings.push({
      check,
      state: serving ? "ok" : "warning",
      detail: `${model}: ${state}${reason === "" ? "" : ` (${reason})`}`,
      ...(serving ? {} : { fix: "wait, or start more workers" }),
    });
    for (const { id } of members.filter((member) => member.state === "refused")) {
      const fix = "run the same Lutra there, under a name of its own (--id)";
      findings.push({ check, state: "failed", detail: `it refuses ${id}`, fix });
    }
  } catch (error) {
    if (error instanceof ClusterError && error.cause instanceof NoRespondersError) {
      findings.push({ check, state: "ok", detail: `nobody serves cluster ${cluster} now` });
    } else if (error instanceof BusError) {
      const fix = "run the same Lutra there, or start it again";
      findings.push({ check, state: "failed", detail: `it gives no proper answer: ${error.message}`, fix });
    } else throw error;
  }
  return findings;
}
