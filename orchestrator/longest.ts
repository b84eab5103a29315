/** As long as a timer can wait, in milliseconds: for what ends by a signal. */
export const LONGEST_MS: number = 2 ** 31 - 1;
