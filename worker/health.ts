/**
 * What may hold a device up, and how to mend it: its cache folder and the model's file, its clock speed and heat, and what the
 * system lets this process have. Read from the system's own files; nothing is changed.
 *
 * @module
 */
import { accessSync, closeSync, constants, existsSync, openSync, readSync, statfsSync, statSync } from "node:fs";
import { dirname } from "node:path";
import type { Finding } from "../bus/mod.ts";

/** Options of {@linkcode deviceHealth}. */
export interface HealthOptions {
  /** The cache of packed weights; absent when nothing is kept. */
  cacheFolder?: string;
  /** A model's file or folder that should be readable. */
  model?: string;
  /** Cores that this process uses. */
  cores: number;
  /** The lines of those of the system's files that are there, by path. Default: read by `grep`, for Deno lets no program open them. */
  read?: (paths: readonly string[]) => Promise<ReadonlyMap<string, string>>;
}

/** Bytes without which a cache is of little use. */
const LEAST_FREE = 2e9;
const CPU = "/sys/devices/system/cpu";
const THERMAL = "/sys/class/thermal";
const HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled";
const THROTTLED = [
  "/sys/devices/platform/soc/soc:firmware/get_throttled",
  "/sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled",
];
const OWN_GROUP = "/proc/self/cgroup";
const ZONES = 16;
const TRIPS = 8;
/** Drivers for which `powersave` means no slow clock. */
const OWN_GOVERNORS = ["intel_pstate", "amd-pstate-epp"];

/** Looks at this device. */
export async function deviceHealth(options: HealthOptions): Promise<Finding[]> {
  const findings: Finding[] = [];
  if (options.cacheFolder !== undefined) findings.push(cacheHealth(options.cacheFolder));
  if (options.model !== undefined) findings.push(modelHealth(options.model));
  if (Deno.build.os !== "linux" && options.read === undefined) return findings;
  let files: ReadonlyMap<string, string>;
  let quota: Finding | undefined;
  try {
    const read = options.read ?? readWithGrep;
    // Of version 2 of control groups, where there is one hierarchy.
    const group = /^0::(\/.+)$/.exec((await read([OWN_GROUP])).get(OWN_GROUP) ?? "")?.[1] ?? "";
    files = await read(systemFiles(options.cores, group));
    quota = quotaHealth(files, options.cores, group);
  } catch (error) {
    const detail = `the system's files cannot be read: ${error instanceof Error ? error.message : error}`;
    return [...findings, { check: "system", state: "warning", detail, fix: "run with -P=worker or -P=doctor" }];
  }
  findings.push(clockSpeedHealth(files, options.cores), heatHealth(files));
  const firmware = firmwareHealth(THROTTLED.map((path) => files.get(path)).find((text) => text !== undefined));
  if (firmware !== undefined) findings.push(firmware);
  if (quota !== undefined) findings.push(quota);
  findings.push(hugePagesHealth(files.get(HUGE_PAGES)));
  return findings;
}

function systemFiles(cores: number, group: string): string[] {
  const paths = [HUGE_PAGES, ...THROTTLED, quotaFile(group)];
  for (let core = 0; core < cores; core++) {
    for (const name of ["scaling_governor", "scaling_driver", "scaling_max_freq", "cpuinfo_max_freq"]) {
      paths.push(`${CPU}/cpu${core}/cpufreq/${name}`);
    }
  }
  for (let zone = 0; zone < ZONES; zone++) {
    const folder = `${THERMAL}/thermal_zone${zone}`;
    paths.push(`${folder}/temp`, `${folder}/type`);
    for (let trip = 0; trip < TRIPS; trip++) {
      paths.push(`${folder}/trip_point_${trip}_temp`, `${folder}/trip_point_${trip}_type`);
    }
  }
  return paths;
}

/** The first line of every file that is there. */
async function readWithGrep(paths: readonly string[]): Promise<ReadonlyMap<string, string>> {
  const { stdout } = await new Deno.Command("grep", {
    ...{ args: ["-sHm1", "", ...paths], stdin: "null", stdout: "piped", stderr: "null" },
  }).output();
  const files = new Map<string, string>();
  for (const line of new TextDecoder().decode(stdout).split("\n")) {
    const path = paths.find((path) => line.startsWith(`${path}:`));
    if (path !== undefined) files.set(path, line.slice(path.length + 1).trim());
  }
  return files;
}

function cacheHealth(folder: string): Finding {
  const check = "cache";
  const fix =
    `give this user the folder: sudo mkdir -p ${folder} && sudo chown $USER ${folder}; or set LUTRA_CACHE to another`;
  let there = folder;
  while (!existsSync(there) && dirname(there) !== there) there = dirname(there);
  try {
    if (!statSync(there).isDirectory()) {
      return { check, state: "failed", detail: `${there} is no folder, so that nothing can be kept in ${folder}`, fix };
    }
    probeWrite(there);
  } catch (error) {
    const detail = `nothing can be kept in ${folder}: ${error instanceof Error ? error.message : error}`;
    return { check, state: "failed", detail, fix };
  }
  const { bavail, bsize } = statfsSync(there);
  const free = Number(bavail) * Number(bsize);
  const detail = `${folder}, ${(free / 1e9).toFixed(1)} GB free`;
  if (free >= LEAST_FREE) return { check, state: "ok", detail };
  return { check, state: "warning", detail, fix: "make room, or set LUTRA_CACHE to a folder on a larger disk" };
}

/** Writes where it may, as rights alone do not tell of read-only disks; elsewhere the rights must do. */
function probeWrite(folder: string): void {
  try {
    Deno.removeSync(Deno.makeTempFileSync({ dir: folder, prefix: ".lutra-" }));
  } catch (error) {
    if (!(error instanceof Deno.errors.NotCapable)) throw error;
    accessSync(folder, constants.W_OK);
  }
}

function modelHealth(path: string): Finding {
  const check = "model";
  const found = statSync(path, { throwIfNoEntry: false });
  if (found === undefined) {
    return {
      check,
      state: "warning",
      detail: `there is no ${path}`,
      fix:
        "copy the model there, or name the folder that has it (worker: --models); a worker without it fetches its layers",
    };
  }
  try {
    if (found.isDirectory()) accessSync(path, constants.R_OK | constants.X_OK);
    else {
      const file = openSync(path, "r");
      try {
        readSync(file, new Uint8Array(4));
      } finally {
        closeSync(file);
      }
    }
  } catch (error) {
    const detail = `${path} cannot be read: ${error instanceof Error ? error.message : error}`;
    return { check, state: "failed", detail, fix: `let this user read it: sudo chmod -R a+rX ${path}` };
  }
  return { check, state: "ok", detail: found.isDirectory() ? path : `${path}, ${(found.size / 1e9).toFixed(2)} GB` };
}

function clockSpeedHealth(files: ReadonlyMap<string, string>, cores: number): Finding {
  const check = "clock speed";
  const held: string[] = [];
  const saving: string[] = [];
  let known = false;
  for (let core = 0; core < cores; core++) {
    const of = (name: string) => files.get(`${CPU}/cpu${core}/cpufreq/${name}`);
    const [most, allowed] = [Number(of("cpuinfo_max_freq")), Number(of("scaling_max_freq"))];
    if (most > 0 && allowed > 0) {
      known = true;
      if (allowed < 0.95 * most) held.push(`cpu${core} at ${gigahertz(allowed)} of ${gigahertz(most)}`);
    }
    if (of("scaling_governor") === "powersave" && !OWN_GOVERNORS.includes(of("scaling_driver") ?? "")) {
      saving.push(`cpu${core}`);
    }
  }
  if (held.length > 0) {
    const fix =
      `allow them more: for f in ${CPU}/cpu*/cpufreq; do sudo sh -c "cat $f/cpuinfo_max_freq > $f/scaling_max_freq"; done`;
    return { check, state: "warning", detail: `held down: ${held.join(", ")}`, fix: `cool the device, or ${fix}` };
  }
  if (saving.length > 0) {
    const fix = `echo ondemand | sudo tee ${CPU}/cpu*/cpufreq/scaling_governor`;
    return { check, state: "warning", detail: `${saving.join(", ")} save power at the lowest clock`, fix };
  }
  return { check, state: "ok", detail: known ? "as fast as the cores go" : "the system does not tell" };
}

function gigahertz(kilohertz: number): string {
  return `${(kilohertz / 1e6).toFixed(1)} GHz`;
}

function heatHealth(files: ReadonlyMap<string, string>): Finding {
  const check = "heat";
  let hottest: { degrees: number; zone: string } | undefined;
  for (let zone = 0; zone < ZONES; zone++) {
    const of = (name: string) => files.get(`${THERMAL}/thermal_zone${zone}/${name}`);
    const temperature = of("temp");
    if (temperature === undefined) continue;
    const degrees = Number(temperature) / 1000;
    const name = of("type") ?? `zone ${zone}`;
    for (let trip = 0; trip < TRIPS; trip++) {
      const limit = Number(of(`trip_point_${trip}_temp`) ?? NaN) / 1000;
      if (!["passive", "hot", "critical"].includes(of(`trip_point_${trip}_type`) ?? "")) continue;
      if (limit > 0 && degrees >= limit) {
        const detail = `${name} has ${degrees} °C, from ${limit} °C on it is slowed down`;
        return { check, state: "failed", detail, fix: "cool it: a heat sink, a fan, a place with air" };
      }
    }
    if (hottest === undefined || degrees > hottest.degrees) hottest = { degrees, zone: name };
  }
  const detail = hottest === undefined ? "the system does not tell" : `${hottest.zone} has ${hottest.degrees} °C`;
  return { check, state: "ok", detail };
}

/** What a Raspberry Pi's firmware tells: bits 0 to 3 of now, 16 to 19 of the time since it started. */
function firmwareHealth(text: string | undefined): Finding | undefined {
  if (text === undefined) return undefined;
  const bits = Number.parseInt(text.replace(/^0x/, ""), 16);
  const check = "power";
  const names = ["too little voltage", "clock held down", "slowed down", "near its limit of heat"];
  const said = (shift: number) => names.filter((_, bit) => bits & (1 << (bit + shift)));
  const fix = bits & 0x1_0001
    ? "use the official power supply and a short cable"
    : "cool it: a heat sink, a fan, a place with air";
  if (said(0).length > 0) return { check, state: "failed", detail: `the firmware tells: ${said(0).join(", ")}`, fix };
  if (said(16).length > 0) {
    return { check, state: "warning", detail: `since it started there was: ${said(16).join(", ")}`, fix };
  }
  return { check, state: "ok", detail: "the firmware tells of no throttling" };
}

function quotaFile(group: string): string {
  return `/sys/fs/cgroup${group}/cpu.max`;
}

/** A control group's limit, in cores. */
function quotaHealth(files: ReadonlyMap<string, string>, cores: number, group: string): Finding | undefined {
  const [quota, period] = (files.get(quotaFile(group)) ?? "max").split(" ");
  const allowed = Number(quota) / Number(period);
  if (!(allowed > 0) || allowed >= cores) return undefined;
  const detail = `${cores} threads share ${allowed.toFixed(2)} cores: the control group allows no more`;
  const fix = `raise its limit (docker: --cpus, systemd: CPUQuota), or start with --threads ${Math.ceil(allowed)}`;
  return { check: "quota", state: "warning", detail, fix };
}

function hugePagesHealth(text: string | undefined): Finding {
  const check = "huge pages";
  if (text === undefined) return { check, state: "ok", detail: "the system has none" };
  if (!text.includes("[never]")) return { check, state: "ok", detail: text };
  const fix = `echo madvise | sudo tee ${HUGE_PAGES}`;
  return { check, state: "warning", detail: "they are off, which costs up to a fifth of the speed", fix };
}
