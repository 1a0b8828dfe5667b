/* Keeps the support library from being empty. */
typedef int moe_test_support_empty;
