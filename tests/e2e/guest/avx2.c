/* Uses instructions of x86-64-v3: AVX2, FMA and BMI2. Exit code 0 if the results are right. */
#include <immintrin.h>

int main(int argc, char **argv)
{
	(void)argv;
	int words[8];
	float singles[8];
	__m256i ones = _mm256_set1_epi32(argc);
	__m256 halves = _mm256_set1_ps(0.5f * (float)argc);
	_mm256_storeu_si256((__m256i *)words, _mm256_add_epi32(ones, _mm256_slli_epi32(ones, 2)));
	_mm256_storeu_ps(singles, _mm256_fmadd_ps(halves, halves, halves));
	for (int i = 0; i < 8; i++)
		if (words[i] != 5 || singles[i] != 0.75f)
			return 1;
	return _pext_u32(0xabcdu * (unsigned)argc, 0x0ff0u) == 0xbcu ? 0 : 2;
}
