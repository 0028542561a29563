// Preact with tagged templates instead of a build step. Text is always set as text, so a caption is never markup.
import { h, render, Component } from "./vendor/preact.mjs";
import htm from "./vendor/htm.mjs";

export const html = htm.bind(h);
export { Component, render };

/** Share of one as a percentage, `0.834` -> `83 %`, with a space that does not break. */
export const percent = (share) => `${Math.round(share * 100)}\u00a0%`;

/** Text of the server without a line break before a sign: in `(p = 0.04)`, in `86 %`. */
export const unbroken = (text) => (text || "").replace(/ ([=%])/g, "\u00a0$1").replace(/= /g, "=\u00a0");

/** Number and noun, `(1, "click")` -> `1 click`, `(3, "click")` -> `3 clicks`. */
export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** Reason of the server as a sentence, `log in first` -> `Log in first.` */
export const sentence = (text) => (text ? `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}` : "");

/** Say something to screen readers, without moving the focus. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** Random UUID; `crypto.randomUUID` exists on HTTPS and localhost only. */
export function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const digits = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return digits.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}
